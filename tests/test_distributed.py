"""Scoring and training in several processes, which gloo joins on this machine."""

import copy
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from fish_tuning import (
    FishConfig,
    FishMask,
    apply_mask,
    calculate_fisher_information,
    get_fish_model,
    get_mask,
    remove_mask,
    score_with_perturbed_b,
)
from fish_tuning.sparse.apply import masked_parameters
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
from tests.processes import in_processes

ROOT = Path(__file__).parents[1]


def lora_bert():
    no_dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0)
    return with_lora(tiny_bert(**no_dropout), init_lora_weights=False, lora_dropout=0.0)


def lora_llama():
    return with_lora(tiny_llama(), init_lora_weights=False, lora_dropout=0.0)


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def scored(model, loader, **options):
    return calculate_fisher_information(model, loader, progress=False, **options)


def assert_equal_scores(actual, expected, rtol=1e-6):
    """Entry by entry: a score is a sum of squares, in which nothing cancels."""
    assert list(actual) == list(expected)
    for name, score in expected.items():
        torch.testing.assert_close(actual[name], score, rtol=rtol, atol=0, msg=name)


def assert_identical(results):
    for other in results[1:]:
        assert list(other) == list(results[0])
        assert all(torch.equal(other[name], first) for name, first in results[0].items())


def error_of(function, *args, **options):
    """Type and message of what the call raises."""
    try:
        function(*args, **options)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


# Scores


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
    """Guards the slow path, and a first batch without labels, which recognises nothing."""
    model = with_lora(tiny_llama(), init_lora_weights=False, lora_dropout=0.0, use_dora=True)
    batches = batches_of(examples_for(model, 7), 2)
    batches[0]["labels"] = torch.full_like(batches[0]["labels"], IGNORED)
    results = in_processes(4, tmp_path / "a", scores_with, model, batches, [{}])
    assert_equal_scores(results[3][0], scored(model, batches))


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
    """A loader of 4 examples a batch, divided among the processes as `kind` says."""
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


class Failing:
    def __init__(self, batches, fails):
        self.batches, self.fails = batches, fails

    def __iter__(self):
        yield from self.batches
        if self.fails:
            raise OSError("disk on fire")


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


# Engines around the model, before it is masked


def wrapped(rank, batches):
    model = lora_bert()
    ddp = DistributedDataParallel(model)
    config = FishConfig(keep_ratio=0.5)
    mask = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in trainable(ddp).items()}
    errors = [
        error_of(apply_mask, ddp, mask),
        # Before anything is scored.
        error_of(get_fish_model, ddp, config, Failing(batches, fails=True), progress=False),
    ]
    scores = scored(ddp, batches), score_with_perturbed_b(ddp, batches, progress=False)
    sharded = []
    cpu = torch.device("cpu")
    for model in (
        fully_shard(lora_llama()),
        FullyShardedDataParallel(lora_llama(), use_orig_params=True, device_id=cpu),
    ):
        sharded.append(error_of(scored, model, batches))
        sharded.append(error_of(apply_mask, model, mask))
    return scores, errors, sharded


def test_wrapped_and_sharded_models(tmp_path):
    """Guards names with DDP's prefix, a reducer that never sees the values, and parts of
    parameters that are scored as if they were whole."""
    model = lora_bert()
    batches = batches_of(examples_for(model, 6), 2)
    for scores, errors, sharded in in_processes(2, tmp_path / "a", wrapped, batches):
        assert_equal_scores(scores[0], scored(model, batches))
        assert_equal_scores(scores[1], score_with_perturbed_b(model, batches, progress=False))
        for kind, message in errors:
            assert kind == "ValueError" and "mask the model first, then wrap it" in message
        for kind, message in sharded:
            assert kind == "ValueError"
            assert message.endswith("score and mask the model before it is sharded")
        assert "FullyShardedDataParallel has divided" in sharded[2][1]


def test_zero_3_is_refused():
    """Guards against scores of the empty tensors that DeepSpeed ZeRO-3 leaves in a model."""
    model = lora_bert()
    mask = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in trainable(model).items()}
    next(model.parameters()).ds_id = 0
    for call in (lambda: scored(model, []), lambda: apply_mask(model, mask)):
        with pytest.raises(ValueError, match=r"DeepSpeed ZeRO-3 has divided .* before it is"):
            call()


@pytest.mark.parametrize("gradients", [True, False])
def test_part_of_the_values_is_refused(gradients):
    """Guards against training under an engine that leaves a process a part of the values."""
    model = lora_bert()
    apply_mask(model, random_mask(model))
    (values,) = masked_parameters(model)
    count = len(values)
    values.data = values.data[:0]
    said = f"holds 0 of {count} trained values: .* not under .*FSDP1.* or DeepSpeed ZeRO-3"
    with pytest.raises(RuntimeError, match=said), torch.set_grad_enabled(gradients):
        model(**pad(examples_for(model, 2)))


# Training


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
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensors[name].detach().clone() for name in mask}


def optimizer_for(model):
    return torch.optim.AdamW(trainable(model).values(), 0.02, weight_decay=0.1)


STEPS = 4


def labelled_alike(model, step):
    """Four examples without padding, so that the mean over a batch is that over its halves."""
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


def unwrapped(model):
    return model.module if isinstance(model, DistributedDataParallel) else model


def assert_same_weights(by_rank, expected, before):
    assert_identical(by_rank)
    for name, tensor in expected.items():
        torch.testing.assert_close(by_rank[0][name], tensor, rtol=1e-5, atol=1e-5, msg=name)
        assert not torch.equal(tensor, before[name]), name


def train_ddp(rank, model, mask, settings):
    apply_mask(model, mask)
    ddp = DistributedDataParallel(model, **settings)
    sent, broadcast = [], []

    def count_gradients(state, bucket):
        sent.append(bucket.buffer().numel())
        work = dist.all_reduce(bucket.buffer().div_(2), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    ddp.register_comm_hook(None, count_gradients)
    whole = dist._broadcast_coalesced

    def count_buffers(group, tensors, *args):
        broadcast.append(sum(tensor.numel() for tensor in tensors))
        return whole(group, tensors, *args)

    dist._broadcast_coalesced = count_buffers
    train(ddp, rank, 2)
    tensors = tensors_of(model, mask)
    remove_mask(model)
    counts = sent, broadcast.copy()
    return tensors, *counts, DistributedDataParallel(model).parameters_to_ignore


@pytest.mark.parametrize("settings", [{}, {"broadcast_buffers": False}])
def test_ddp_trains_as_one_process(settings, tmp_path):
    """Guards against gradients that are not averaged, more than k numbers sent a step, and
    frozen entries broadcast before each forward pass."""
    model = lora_bert()
    mask = random_mask(model)
    one = apply_mask(copy.deepcopy(model), mask)
    before = tensors_of(one, mask)
    train(one)
    results = in_processes(2, tmp_path / "a", train_ddp, model, mask, settings)
    assert_same_weights([tensors for tensors, *_ in results], tensors_of(one, mask), before)
    own = sum(buffer.numel() for buffer in model.buffers())
    assert own > 0
    for _, sent, broadcast, ignored in results:
        assert sum(sent) == STEPS * get_mask(one).num_trainable
        assert broadcast == ([] if settings else [own] * STEPS)
        assert not ignored  # After remove_mask.


def train_fsdp(rank, model, mask):
    apply_mask(model, mask)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    train(model, rank, 2)
    trained = tensors_of(model, mask)
    state = {name: tensor for name, tensor in model.state_dict().items() if name in mask}
    assert_identical([trained, state])
    state = {name: tensor + 1 for name, tensor in state.items()}
    parameters: list[Any] = masked_parameters(model)  # DTensors
    held = sum(p.to_local().numel() for p in parameters)
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))
    loaded = tensors_of(model, mask)
    with torch.no_grad():  # Writes the values into the tensors.
        model(**labelled_alike(model, 0))
    return trained, held, loaded, tensors_of(model, mask)


def test_fully_shard_trains_as_one_process(tmp_path):
    """Guards against values that are divided when the tensors are written, saved or loaded."""
    model = lora_llama()
    mask = random_mask(model)
    one = apply_mask(copy.deepcopy(model), mask)
    before = tensors_of(one, mask)
    train(one)
    results = in_processes(2, tmp_path / "a", train_fsdp, model, mask)
    assert_same_weights([trained for trained, *_ in results], tensors_of(one, mask), before)
    assert sum(held for _, held, *_ in results) == get_mask(one).num_trainable
    for trained, _, loaded, written in results:
        assert_identical([{name: tensor + 1 for name, tensor in trained.items()}, loaded, written])


TRAINER = """
import sys
import torch
from transformers import Trainer, TrainingArguments
from fish_tuning import FishConfig, FishTuningTrainer, get_fish_model
from tests.models import examples_for, tiny_bert, with_lora

folder, batch_size = sys.argv[1], int(sys.argv[2])
rates = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
model = with_lora(tiny_bert(**rates), lora_dropout=0.0)
data = examples_for(model, 13, shortest=6, longest=6)
args = TrainingArguments(
    folder,
    max_steps=6,
    per_device_train_batch_size=batch_size,
    learning_rate=0.01,
    weight_decay=0.1,
    average_tokens_across_devices=False,  # It doubles the loss of a classifier.
    save_strategy="no",
    use_cpu=True,
    report_to="none",
    disable_tqdm=True,
)
loader = Trainer(model=model, args=args, train_dataset=data).get_train_dataloader()
get_fish_model(model, FishConfig(keep_ratio=0.3), loader, progress=False)
# Without a smaller last batch, whose halves would weigh as much as whole ones.
trainer = FishTuningTrainer(model=model, args=args, train_dataset=data[:12])
trainer.train()
trainer.save_model()
if trainer.is_world_process_zero():
    print("processes", args.world_size)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_trainer_under_torchrun(tmp_path):
    """Guards FishTuningTrainer's DDP, and scoring with the Trainer's own loader."""
    script = tmp_path / "train.py"
    script.write_text(TRAINER, encoding="utf-8")
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    for count, batch_size in ((1, 4), (2, 2)):
        done = subprocess.run(
            [*launch, f"--nproc-per-node={count}", script, tmp_path / f"{count}", f"{batch_size}"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert f"processes {count}" in done.stdout
    one, two = (load_file(tmp_path / f"{count}" / "adapter_model.safetensors") for count in (1, 2))
    masks = [FishMask.from_pretrained(tmp_path / f"{count}") for count in (1, 2)]
    assert masks[0] == masks[1]
    assert list(one) == list(two)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
