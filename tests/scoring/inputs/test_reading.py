"""Loaders and batches as people have them."""

from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fish_tuning import calculate_fisher_information
from tests.models import (
    assert_scores_close,
    examples_for,
    naive_scores,
    pad,
    tiny_bert,
    tiny_llama,
    with_lora,
)

datasets = pytest.importorskip("datasets")
Dataset, DatasetDict = datasets.Dataset, datasets.DatasetDict

IDS = torch.randint(2, 40, (4, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1]] * 4)
CLASSES = torch.tensor([0, 2, 1, 0])
Named = namedtuple("Named", ["input_ids", "labels"])


def scored(model, loader, **options):
    return calculate_fisher_information(model, loader, progress=False, **options)


def adapted(build):
    return with_lora(build(), init_lora_weights=False).double()


@pytest.mark.parametrize(
    ("build", "labels"), [(tiny_llama, IDS), (tiny_bert, CLASSES)], ids=["tokens", "classes"]
)
@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: (x, y),
        lambda x, y: [x, y],
        lambda x, y: ({"input_ids": x}, y),
        lambda x, y: [{"input_ids": x, "labels": y}],
        Named,
        lambda x, y: {"input_ids": x.tolist(), "labels": y.tolist()},
    ],
    ids=["tuple", "list", "mapping and labels", "mapping alone", "named tuple", "lists of numbers"],
)
def test_forms_that_are_certain(build, labels, form):
    """Guards against labels that are shifted for a mapping and not for a pair, and against
    arguments that are dropped."""
    model = adapted(build)
    expected = scored(model, [{"input_ids": IDS, "labels": labels}])
    assert_scores_close(scored(model, [form(IDS, labels)]), expected)


COLUMNS = {"input_ids": IDS.tolist(), "labels": CLASSES.tolist()}
TOKENS = {"input_ids": IDS.tolist(), "labels": IDS.tolist()}


@pytest.mark.parametrize(
    ("build", "loader", "message"),
    [
        (tiny_bert, [(IDS, LEFT, CLASSES)], "3 items without names .*which are which: name its"),
        (tiny_bert, [(IDS, MASK, LEFT)], r"3 items without names"),
        (tiny_bert, [(IDS, IDS, IDS)], r"3 items without names"),
        (tiny_bert, [(IDS, MASK, MASK, CLASSES)], r"4 items without names"),
        (tiny_llama, [(IDS, MASK)], "looks like an attention mask, not like labels"),
        (tiny_bert, [({"input_ids": IDS}, MASK, CLASSES)], "a mapping and 2 more items"),
        (tiny_bert, [({"input_ids": IDS, "labels": IDS}, MASK)], "a mapping and 1 more item,"),
        (tiny_bert, [[{"input_ids": IDS[0]}] * 4], "a list of 4 mappings, .*: collate them"),
        (tiny_bert, {"input_ids": IDS, "labels": CLASSES}, r"put it in a list, \[batch\]"),
        (tiny_bert, Dataset.from_dict(COLUMNS), "a single example, not a batch: wrap the dataset"),
        (tiny_bert, Dataset.from_dict(COLUMNS).with_format("torch"), "a single example, not"),
        (tiny_llama, Dataset.from_dict(TOKENS), "a single example, not a batch"),
        (tiny_llama, Dataset.from_dict(TOKENS).with_format("torch"), "a single example, not a ba"),
        (tiny_bert, DatasetDict(train=Dataset.from_dict(COLUMNS)), "several datasets .train."),
        (tiny_bert, TensorDataset(IDS, CLASSES), "TensorDataset yields single examples, not"),
        (tiny_bert, "imdb", "the calibration dataloader is a str: give a DataLoader, or a list"),
        (tiny_bert, 3, "the calibration dataloader is a int"),
        (tiny_bert, IDS, "the calibration dataloader is a Tensor"),
        (tiny_bert, [4], "a calibration batch is a int: give mappings of tensors, or pairs"),
        (
            tiny_bert,
            [{"text": ["a"], "label": [0]}],
            "needs an input, .*text: list of 1.*: tokenize",
        ),
        (tiny_bert, [{"text": ["a"]}], r"no tensor in a calibration batch \(text: list of 1\)"),
        (tiny_bert, [{"input_ids": [[1, 2], [3]], "labels": [0, 1]}], "of different lengths: pad"),
        (tiny_bert, DataLoader(Dataset.from_dict(COLUMNS), 2), "input_ids is a list of tensors"),
        (tiny_llama, DataLoader(Dataset.from_dict(TOKENS), 2), "input_ids is a list of tensors"),
    ],
)
def test_forms_that_are_not_are_refused(build, loader, message):
    """Guards against a guess, and against an error of the model that explains nothing."""
    with pytest.raises(ValueError, match=message) as raised:
        scored(adapted(build), loader)
    assert len(str(raised.value)) < 400


def test_an_argument_that_is_missing_is_named():
    """Guards against a TypeError, after a warning that everything was dropped."""
    net = nn.Sequential(nn.Linear(4, 2))
    batch = {"x": torch.zeros(3, 4), "y": torch.zeros(3).long()}
    for options in ({}, {"loss_fn": lambda outputs, batch: outputs.sum(1)}):
        with pytest.raises(
            ValueError, match=r"needs input, .* \(x: \(\d, 4\), y: \(\d,\)\): token"
        ):
            scored(net, [batch], **options)


def test_a_loss_fn_gets_the_items_as_they_are():
    """Guards batches whose meaning only the caller's loss function knows."""
    net, seen = nn.Linear(4, 2), []
    batch = (torch.randn(3, 4), torch.randn(3, 2), torch.ones(3))

    def loss_fn(outputs, items):
        seen.append(len(items))
        return (outputs - items[1]).square().sum(1) * items[2]

    scored(net, [batch], loss_fn=loss_fn)
    assert seen == [3]
    with pytest.raises(ValueError, match=r"3 items without names, and Bert.* takes more than one"):
        scored(adapted(tiny_bert), [(IDS, MASK, CLASSES)], loss_fn=loss_fn)


def test_batches_of_a_data_set_are_read():
    """Guards `Dataset.iter`, which yields lists of numbers."""
    model = adapted(tiny_bert)
    expected = scored(model, [{"input_ids": IDS, "labels": CLASSES}])
    data = Dataset.from_dict(COLUMNS)
    assert_scores_close(scored(model, data.iter(2)), expected)
    assert_scores_close(scored(model, data.with_format("torch").iter(3)), expected)


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama])
def test_the_mask_of_a_triple_is_told_by_its_ones(build):
    """Guards (ids, mask, labels) of a TensorDataset, the mask of which was dropped."""
    model = adapted(build)
    batch = pad(examples_for(model, 5))
    triple = batch["input_ids"], batch["attention_mask"], batch["labels"]
    assert_scores_close(scored(model, [triple]), scored(model, [batch]))


def test_padded_examples_are_still_padded():
    """Guards the mask of a mapping inside a pair."""
    model = adapted(tiny_bert)
    batch = pad(examples_for(model, 5))
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    assert_scores_close(scored(model, [(inputs, batch["labels"])]), scored(model, [batch]))


def test_arrays_of_numbers_are_read():
    """Guards NumPy's arrays, which have all that a tensor has."""
    model = adapted(tiny_bert)
    expected = scored(model, [{"input_ids": IDS, "labels": CLASSES}])
    batch = {"input_ids": IDS.numpy(), "labels": CLASSES.numpy()}
    for loader in ([batch], [tuple(batch.values())]):
        assert_scores_close(scored(model, loader), expected)


def test_a_batch_of_no_example_is_passed_over():
    """Guards against an error, or a score, for the empty rest of a data set."""
    model = adapted(tiny_bert)
    batch = {"input_ids": IDS, "labels": CLASSES}
    empty = {key: value[:0] for key, value in batch.items()}
    assert_scores_close(scored(model, [empty, batch, empty]), scored(model, [batch]))


def test_labels_for_each_output_are_divided():
    """Guards a list of labels, one tensor for each head, against being read as examples."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 2)

        def forward(self, input_ids, labels=None):
            x = input_ids.double() / 40
            logits = self.a(x), self.b(x)
            losses = [F.cross_entropy(*pair) for pair in zip(logits, labels, strict=True)]
            return {"loss": sum(losses), "logits": logits}

    model = Heads().double()
    rows = [
        {"input_ids": IDS[i : i + 1], "labels": [CLASSES[i : i + 1], CLASSES[i : i + 1] % 2]}
        for i in range(len(IDS))
    ]
    expected = naive_scores(model, rows, loss=lambda model, row: model(**row)["loss"])
    batch = {"input_ids": IDS, "labels": [CLASSES, CLASSES % 2]}
    assert_scores_close(scored(model, [batch]), expected)


def test_gradients_are_needed():
    """Guards against a message about parameters that the loss does not use."""
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match=r"inference_mode\(\) .* outside it"),
    ):
        scored(adapted(tiny_bert), [{"input_ids": IDS, "labels": CLASSES}])
