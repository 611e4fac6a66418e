"""The adapters library under a mask: every method, its Trainer, its files, and docs/adapters.md."""

import functools
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from fish_tuning import (
    FishMask,
    FishTuningCallback,
    FishTuningTrainer,
    apply_mask,
    calculate_fisher_information,
    create_mask_from_fisher,
    get_mask,
    score_with_perturbed_b,
)

adapters = pytest.importorskip("adapters")

from adapters import AdapterTrainer  # noqa: E402
from adapters.configuration.adapter_config import ADAPTER_CONFIG_MAP  # noqa: E402

from tests.adapters_table import METHODS, NAME, build, outcomes, page  # noqa: E402
from tests.methods_table import assert_trained, changes_of, output, rows_of, state_of, trainable  # noqa: E402
from tests.models import (  # noqa: E402
    assert_scores_close,
    batches_of,
    examples_for,
    naive_scores,
    pad,
    tiny_bert,
)
from tests.rounding import float32_rtol, nudged  # noqa: E402

PAGE = (Path(__file__).parents[1] / "docs" / "adapters.md").read_text(encoding="utf-8")
ROWS = rows_of(PAGE)
BY_NAME = {method.name: method for method in METHODS}
PUBLISHED = ["Bottleneck (Pfeiffer), `seq_bn`", "LoRA", "DoRA", "UniPELT"]
"""The methods of arXiv 2504.04050."""


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method(method, tmp_path):
    """Guards scores, masks, training, files and merging of modules that PEFT does not have, and a
    table that says something else than what happens."""
    assert outcomes(method, tmp_path) == ROWS[method.name]


def test_no_method_is_missing():
    """Guards against a kind of config of the installed library that nobody has tried."""

    def kinds(config):
        return {type(part) for part in getattr(config, "configs", [config])}

    tried = set().union(*(kinds(method.config()) for method in METHODS))
    for config in ADAPTER_CONFIG_MAP.values():
        # The double one with invertible layers is tried in its parts; LoRA of several tasks needs
        # several adapters at once.
        untried = {"DoubleSeqBnInvConfig", "DvoRAConfig", "MTLLoRAConfig"}
        assert {kind.__name__ for kind in kinds(config) - tried} <= untried


def test_the_page_is_made_of_its_rows():
    """Guards text typed into the page, rows of methods that are gone, and blank cells."""
    assert list(ROWS) == [method.name for method in METHODS]
    assert page(ROWS) == PAGE


def test_the_pages_example(tmp_path, monkeypatch):
    """Guards an example that does not run as it is printed (but for the budget)."""
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    model = tiny_bert()
    train = examples_for(model, 8, shortest=6, longest=6)
    names = {"model": model, "train": train, "loader": batches_of(train, 4)}
    names["args"] = arguments(tmp_path / "output")
    names["args"].remove_unused_columns = False
    exec(compile(block.replace("56_000", "1_000"), "adapters.md", "exec"), names)
    assert sum(p.numel() for p in trainable(model).values()) == 1000
    assert FishMask.from_pretrained("adapter") == names["mask"]


def arguments(folder, **settings):
    return TrainingArguments(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **{"save_strategy": "no", "weight_decay": 0.1, **settings},
    )


def random_mask(model, density=0.4):
    generator = torch.Generator().manual_seed(0)
    return FishMask(
        {
            name: torch.rand(p.shape, generator=generator) < density
            if "classifier" not in name
            else torch.ones(p.shape, dtype=torch.bool)
            for name, p in trainable(model).items()
        }
    )


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def trainer_for(kind, model, folder, mask=None, **settings):
    examples = examples_for(model, 12, shortest=6, longest=6)
    options = {"mask": mask} if kind is FishTuningTrainer else {}
    if kind is AdapterTrainer and mask is not None:
        options = {"callbacks": [FishTuningCallback(mask)]}
    return kind(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=examples,
        eval_dataset=examples,
        data_collator=pad,
        **options,
    )


@pytest.mark.parametrize("kind", [FishTuningTrainer, AdapterTrainer], ids=lambda k: k.__name__)
@pytest.mark.parametrize("name", PUBLISHED)
def test_trainers_equal_a_dense_reference(name, kind, tmp_path):
    """Guards both Trainers: what is selected ends where masked gradients lead, and the rest of the
    model keeps its bits."""
    model, twin, other = (without_dropout(build(BY_NAME[name])) for _ in range(3))
    mask, start = random_mask(model), state_of(model)
    trainer = trainer_for(kind, model, tmp_path, mask, weight_decay=0.0)
    assert sum(p.numel() for p in trainable(model).values()) == mask.num_trainable
    trainer.train()
    for dense in (twin, other):
        for key, p in trainable(dense).items():
            p.register_hook(lambda gradient, bits=mask[key]: gradient * bits)
    trainer_for(AdapterTrainer, twin, tmp_path, weight_decay=0.0).train()
    with nudged(other, seed=0):
        trainer_for(AdapterTrainer, other, tmp_path, weight_decay=0.0).train()
        changes = changes_of(twin, other)
    assert_trained(model, twin, mask, start, changes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_weight_decay_moves_nothing_frozen(name, tmp_path):
    """Guards frozen entries' bits in AdapterTrainer, whose groups of weight decay are its own."""
    model = build(BY_NAME[name])
    mask = random_mask(model)
    before = {key: p.detach().clone() for key, p in trainable(model).items()}
    trainer_for(AdapterTrainer, model, tmp_path, mask, weight_decay=0.1).train()
    now = model.state_dict()
    for key, bits in mask.items():
        assert torch.equal(now[key][~bits], before[key][~bits]), key
    moved = sum(int((now[key] != before[key])[bits].sum()) for key, bits in mask.items())
    assert moved > 0.9 * mask.num_trainable


@pytest.mark.parametrize("name", PUBLISHED)
def test_saved_by_the_trainer_and_trained_on(name, tmp_path):
    """Guards the way back: files of AdapterTrainer, loaded into another model with their mask."""
    model = build(BY_NAME[name])
    mask = random_mask(model)
    trainer = trainer_for(AdapterTrainer, model, tmp_path, mask)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    folder = tmp_path / "saved" / NAME
    assert "adapters.init(model)" in (folder / "README.md").read_text(encoding="utf-8")
    other = tiny_bert()
    adapters.init(other)
    other.train_adapter(other.load_adapter(str(folder)))
    apply_mask(other, FishMask.from_pretrained(folder))
    assert get_mask(other) == mask
    batch = pad(examples_for(model, 4))
    torch.testing.assert_close(output(other, batch), output(model, batch))
    trainer_for(AdapterTrainer, other, tmp_path).train()


def test_the_best_adapter_comes_back(tmp_path):
    """Guards values against load_adapter, which reads module by module and runs no hook after it:
    the next forward pass would write the old values over what was loaded."""
    model = build(BY_NAME["UniPELT"])
    model.save_adapter(str(tmp_path / "start"), NAME)
    batch = pad(examples_for(model, 4))
    expected = output(model, batch)
    trainer = trainer_for(AdapterTrainer, model, tmp_path, random_mask(model))
    trainer.train()
    assert not torch.allclose(output(model, batch), expected, atol=1e-3)
    model.load_adapter(str(tmp_path / "start"))
    torch.testing.assert_close(output(model, batch), expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_heads_of_the_library(name):
    """Guards models of the adapters library itself, with heads that it adds."""
    model = adapters.BertAdapterModel(tiny_bert().config)
    model.add_adapter(NAME, BY_NAME[name].config())
    model.add_classification_head(NAME, num_labels=3)
    model.train_adapter(NAME)
    model.eval()
    examples = examples_for(tiny_bert(), 6)
    scores = calculate_fisher_information(model, batches_of(examples, 3), progress=False)
    loss = lambda model, example: model(**pad([example])).loss  # noqa: E731
    naive = functools.partial(naive_scores, model, examples, loss=loss)
    expected = naive()
    assert_scores_close(scores, expected, float32_rtol(model, naive, expected))
    mask = create_mask_from_fisher(scores, num_trainable=300, names_to_exclude=["^heads"])
    apply_mask(model, mask)
    assert sum(p.numel() for p in trainable(model).values()) == 300
    model(**pad(examples)).loss.backward()


def test_lora_at_its_start():
    """Guards names of LoRA's sides that are not PEFT's: while B = 0, A has the score of the
    formula in `score_with_perturbed_b`, and half of a balanced budget."""
    model = tiny_bert()
    adapters.init(model)
    model.add_adapter(NAME, adapters.LoRAConfig(r=64, alpha=64))
    model.train_adapter(NAME)
    model.eval()
    examples = examples_for(model, 6)
    batches = batches_of(examples, 3)
    scores = score_with_perturbed_b(model, batches, progress=False)

    layer = "bert.encoder.layer.0.attention.self.query"
    dense = tiny_bert().eval()
    weight = dense.get_submodule(layer).weight
    expected = torch.zeros(weight.shape[1])
    for example in examples:
        (gradient,) = torch.autograd.grad(dense(**pad([example])).loss, weight)
        expected += gradient.square().sum(0) / len(examples)
    # A mean over 64 rows of A, each with its own random row of B^T.
    found = scores[f"{layer}.loras.{NAME}.lora_A"].mean(0)
    assert (found - expected).norm() < 0.3 * expected.norm()

    mask = create_mask_from_fisher(
        scores, num_trainable=1039, names_to_exclude=["classifier"], scope="balanced"
    )
    head = sum(int(mask[name].sum()) for name in mask if "classifier" in name)
    sides = [sum(int(mask[n].sum()) for n in mask if n.endswith(f"lora_{s}")) for s in "AB"]
    assert sides == [500, 500] and head == 39
