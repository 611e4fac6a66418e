"""Scoring in several processes, joined by gloo on one machine."""

import copy
import random
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from transformers import DataCollatorWithFlattening

from fish_tuning import FishConfig, apply_mask, get_fish_model, get_mask, score_with_perturbed_b
from tests.models import (
    IGNORED,
    assert_scores_close,
    batches_of,
    examples_for,
    naive_scores,
    pad,
    tiny_bert,
    tiny_llama,
    with_lora,
)
from tests.parallel import (
    Failing,
    assert_equal_scores,
    assert_identical,
    error_of,
    lora_bert,
    lora_llama,
    scored,
    trainable,
)
from tests.processes import in_processes


def scores_with(rank, model, batches, options):
    return [scored(model, batches, **each) for each in options]


@pytest.mark.parametrize("count", [2, 1, 4])
def test_scores_are_those_of_one_process(count, tmp_path):
    """Guards against examples that count twice or not at all, a cut at another place, labels
    drawn for another number, and processes that disagree."""
    model = lora_bert()
    examples = examples_for(model, 13)
    batches = batches_of(examples, 3)
    options = [
        {},
        {"num_samples": 8},
        {"num_samples": 2},
        {"estimator": "true", "label_samples": 2},
        {"statistic": "absolute"},
    ]
    by_rank = in_processes(count, tmp_path / "a", scores_with, model, batches, options)
    for each, results in zip(options, zip(*by_rank, strict=True), strict=True):
        assert_identical(results)
        assert_equal_scores(results[0], scored(model, batches, **each))
    assert_scores_close(by_rank[0][0], naive_scores(model, examples), 1e-4)


def test_language_model_one_example_at_a_time(tmp_path):
    """Guards the slow path, and a first batch without labels, by which no loss is recognized."""
    model = with_lora(tiny_llama(), init_lora_weights=False, lora_dropout=0.0, use_dora=True)
    batches = batches_of(examples_for(model, 7), 2)
    batches[0]["labels"] = torch.full_like(batches[0]["labels"], IGNORED)
    results = in_processes(4, tmp_path / "a", scores_with, model, batches, [{}])
    assert_equal_scores(results[3][0], scored(model, batches))


def test_rows_of_several_examples(tmp_path):
    """Guards the number of each example, and a cut within a row, when processes share the rows."""
    model = lora_llama()
    examples = [
        {key: example[key].tolist() for key in ("input_ids", "labels")}
        for example in examples_for(model, 11)
    ]
    collator = DataCollatorWithFlattening()
    rows = [collator(examples[i : i + 3]) for i in range(0, 11, 3)]
    options = [{"num_samples": 8}, {"estimator": "true"}]
    by_rank = in_processes(2, tmp_path / "a", scores_with, model, rows, options)
    for each, results in zip(options, zip(*by_rank, strict=True), strict=True):
        assert_identical(results)
        assert_equal_scores(results[0], scored(model, rows, **each))


def perturbed_and_masked(rank, batches):
    scores = score_with_perturbed_b(with_lora(tiny_bert()), batches, progress=False)
    config = FishConfig(keep_ratio=0.2, num_samples=8)
    model = get_fish_model(with_lora(tiny_bert()), config, batches, progress=False)
    return scores, get_mask(model)


def test_perturbed_scores_and_masks(tmp_path):
    """Guards against a perturbation or a mask that differs between processes."""
    batches = batches_of(examples_for(tiny_bert(), 9), 2)
    expected, mask = perturbed_and_masked(0, batches)
    results = in_processes(2, tmp_path / "a", perturbed_and_masked, batches)
    assert_identical([scores for scores, _ in results])
    assert_equal_scores(results[0][0], expected)
    assert all(each == mask for _, each in results)


# Loaders


class Stream(IterableDataset):
    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        return iter(self.examples)


class Shuffled:
    """Batches in an order that Python's and numpy's generators make."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        order = np.random.permutation(len(self.batches)).tolist()
        random.shuffle(order)
        return (self.batches[i] for i in order)


def prepared(loader, **config):
    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**config)).prepare(
        loader
    )


def loader_of(kind, examples):
    """A loader of 4 examples per batch, divided among the processes as `kind` says."""
    settings = {"batch_size": 4, "collate_fn": pad}
    plain = DataLoader(examples, shuffle=True, **settings)
    stream = DataLoader(Stream(examples), **settings)
    if kind.startswith("sampler"):
        sampler = DistributedSampler(examples, drop_last="drop" in kind)
        return DataLoader(examples, sampler=sampler, **settings)
    return {
        "plain": lambda: plain,
        "shuffled": lambda: Shuffled(batches_of(examples, 4)),
        "seedable": lambda: prepared(plain, use_seedable_sampler=True, data_seed=0),
        "generator": lambda: prepared(plain, use_seedable_sampler=False),
        "split": lambda: prepared(plain, split_batches=True),
        "uneven": lambda: prepared(plain, even_batches=False),
        "dispatched": lambda: prepared(plain, dispatch_batches=True),
        "stream": lambda: prepared(stream, dispatch_batches=False),
        "dispatched stream": lambda: prepared(stream),
    }[kind]()


KINDS = ["plain", "shuffled", "seedable", "generator", "split", "uneven", "dispatched", "stream"]
KINDS += ["dispatched stream", "sampler", "sampler, drop_last"]


def division_of(loader):
    """How the parts of a loader are set, except for the epoch that a pass over it moves on."""
    if not isinstance(loader, DataLoader):
        return []
    parts = [loader.dataset, loader.batch_sampler, loader.sampler]
    return [
        {k: v for k, v in vars(part).items() if isinstance(v, int | bool) and k != "epoch"}
        for part in parts
        if hasattr(part, "__dict__")
    ]


def scores_by_loader(rank, model, examples):
    results = []
    for kind in KINDS:
        # As in a program that has set no seed.
        torch.manual_seed(rank), random.seed(rank), np.random.seed(rank)
        loader = loader_of(kind, examples)
        before = division_of(loader)
        some = scored(model, loader, num_samples=6)
        results.append((scored(model, loader), some))
        assert division_of(loader) == before, kind
    return results


def test_divided_loaders_are_put_together(tmp_path):
    """Guards against the examples that accelerate and DistributedSampler repeat or drop to make
    the parts equal, and against shuffling that differs between processes."""
    model = lora_bert()
    examples = examples_for(model, 13)
    whole = naive_scores(model, examples)
    by_rank = in_processes(2, tmp_path / "a", scores_by_loader, model, examples)
    for results in zip(*by_rank, strict=True):
        assert_identical([scores for scores, _ in results])
        assert_identical([scores for _, scores in results])
        assert_scores_close(results[0][0], whole, 1e-4)
    torch.manual_seed(0)
    expected = scored(model, loader_of("plain", examples), num_samples=6)
    assert_equal_scores(by_rank[0][KINDS.index("plain")][1], expected)


def scores_of_own_part(rank, model, batches):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    before = {name: p.clone() for name, p in trainable(model).items()}
    errors = [error_of(scored, model, batches[rank::2])]
    errors.append(error_of(scored, model, batches[rank:]))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert all(torch.equal(p, before[name]) for name, p in trainable(model).items())
    return errors


def test_different_batches_are_refused(tmp_path):
    """Guards against data that the caller has divided and that would be divided once more."""
    model = lora_bert()
    batches = batches_of(examples_for(model, 12), 2)
    for errors in in_processes(2, tmp_path / "a", scores_of_own_part, model, batches):
        for kind, message in errors:
            assert kind == "ValueError"
            assert "given different calibration batches: give each of them the whole" in message


def scores_of_unseeded_model(rank, batches):
    torch.manual_seed(rank)
    model = with_lora(tiny_bert(), seed=rank)
    mask = {name: torch.rand(p.shape) < 0.5 for name, p in trainable(model).items()}
    same = with_lora(tiny_bert())
    return [
        error_of(scored, model, batches),
        error_of(apply_mask, model, {k: torch.ones_like(v) for k, v in mask.items()}),
        error_of(apply_mask, same, mask),
    ]


def test_different_weights_are_refused(tmp_path):
    """Guards against adapters or masks of no common seed: nobody would send what differs."""
    batches = batches_of(examples_for(tiny_bert(), 4), 2)
    for errors in in_processes(2, tmp_path / "a", scores_of_unseeded_model, batches):
        for kind, message in errors:
            assert kind == "ValueError"
            assert "different trainable weights or masks: set the same seed" in message


# Failures


def failures(rank, model, batches):
    start = time.monotonic()
    unlabelled = [{**b, "labels": torch.full_like(b["labels"], IGNORED)} for b in batches]
    broken = copy.deepcopy(batches)
    broken[1]["inputs_embeds"] = torch.full((2, broken[1].pop("input_ids").shape[1], 12), torch.nan)
    errors = [
        error_of(scored, model, broken),
        error_of(scored, model, Failing(batches, fails=rank == 1)),
        error_of(scored, model, unlabelled),
        error_of(scored, model, []),
        error_of(scored, model, [] if rank else batches),
    ]
    assert not model.base_model.model.model.layers[0].training
    # All is well afterwards.
    return errors, scored(model, batches), time.monotonic() - start


def test_failure_in_one_process_reaches_all(tmp_path):
    """Guards against processes that wait for one that has raised, and errors without a cause."""
    model = lora_llama().eval()
    batches = batches_of(examples_for(model, 6), 2)
    results = in_processes(2, tmp_path / "a", failures, model, batches)
    (first, scores, seconds), (second, _, _) = results
    nan = "ValueError: the loss of calibration example 2 is nan"
    assert first[0][0] == "RuntimeError" and f"scoring failed in process 1: {nan}" in first[0][1]
    assert second[0][0] == "ValueError" and second[0][1] in first[0][1]
    assert first[1] == ("RuntimeError", "scoring failed in process 1: OSError: disk on fire")
    assert second[1] == ("OSError", "disk on fire")
    for errors in (first, second):
        assert errors[2] == ("ValueError", "all labels of the 6 calibration examples are -100")
        assert errors[3][0] == "ValueError" and "dataloader is empty" in errors[3][1]
    assert first[4][0] == "RuntimeError" and "process 1: ValueError: the calibration" in first[4][1]
    assert second[4] == second[3]
    assert_equal_scores(scores, scored(model, batches))
    assert seconds < 20
