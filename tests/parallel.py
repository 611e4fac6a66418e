"""Models, training and comparisons for tests of several processes and of wrapped models."""

import copy
from operator import attrgetter

import torch
from torch.nn.parallel import DistributedDataParallel

from fish_tuning import apply_mask, calculate_fisher_information
from tests.models import examples_for, pad, tiny_bert, tiny_llama, with_lora


def lora_bert():
    no_dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0)
    return with_lora(tiny_bert(**no_dropout), init_lora_weights=False, lora_dropout=0.0)


def lora_llama():
    return with_lora(tiny_llama(), init_lora_weights=False, lora_dropout=0.0)


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def scored(model, loader, **options):
    return calculate_fisher_information(model, loader, progress=False, **options)


def assert_equal_scores(actual, expected, rtol=2e-5):
    """Entry by entry: a score is a sum of squares, in which nothing cancels. In the gradients of
    these models something does, of an attention's keys above all: in float32 their scores were up
    to 4e-6 from those in float64."""
    assert list(actual) == list(expected)
    for name, score in expected.items():
        torch.testing.assert_close(actual[name], score, rtol=rtol, atol=0, msg=name)


def assert_identical(results):
    for other in results[1:]:
        assert list(other) == list(results[0])
        assert all(torch.equal(other[name], first) for name, first in results[0].items())


def error_of(function, *args, **options):
    """Return type and message of the exception that the call raises."""
    try:
        function(*args, **options)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


class Failing:
    """A loader that may fail after its last batch."""

    def __init__(self, batches, fails):
        self.batches, self.fails = batches, fails

    def __iter__(self):
        yield from self.batches
        if self.fails:
            raise OSError("disk on fire")


def random_mask(model, density=0.3):
    """Entries of the adapter, and all of the head."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.ones(p.shape, dtype=torch.bool)
        if "modules_to_save" in name
        else torch.rand(p.shape, generator=generator) < density
        for name, p in trainable(model).items()
    }


def tensors_of(model, mask):
    return {name: attrgetter(name)(model).detach().clone() for name in mask}


def optimizer_for(model):
    return torch.optim.AdamW(trainable(model).values(), 0.02, weight_decay=0.1)


STEPS = 4


def labelled_alike(model, step):
    """Four examples without padding, so that the mean over a batch is the mean over its halves."""
    return pad(examples_for(model, 4, step, shortest=7, longest=7))


def train(model, rank=0, count=1):
    """Trains on this process's part of each batch."""
    optimizer = optimizer_for(model)
    size = 4 // count
    for step in range(STEPS):
        batch = labelled_alike(unwrapped(model), step)
        if "labels" in batch and batch["labels"].dim() > 1:
            batch["labels"] = batch["input_ids"]
        part = {key: value[rank * size : (rank + 1) * size] for key, value in batch.items()}
        model(**part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_alone(model, mask):
    """A masked copy of a model after one process has trained it, and its tensors before that."""
    one = apply_mask(copy.deepcopy(model), mask)
    before = tensors_of(one, mask)
    train(one)
    return one, before


def unwrapped(model):
    return model.module if isinstance(model, DistributedDataParallel) else model


def assert_same_weights(by_rank, expected, before):
    assert_identical(by_rank)
    for name, tensor in expected.items():
        torch.testing.assert_close(by_rank[0][name], tensor, rtol=1e-5, atol=1e-5, msg=name)
        assert not torch.equal(tensor, before[name]), name
