"""A training step and its memory beside LoRA, gradient hooks and PEFT's other methods."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import torch
from torch import nn

from benchmarks.contenders import (
    HEAD,
    Contender,
    Way,
    fish,
    fish_upper_layers,
    half_of,
    hooked,
    lora,
    peers,
    trainable,
)
from benchmarks.measure import Rounds, take_turns
from benchmarks.setting import Setting
from benchmarks.shapes import MINILM, TINYLLAMA, Batch, Shape, batch_of
from benchmarks.table import Row, timed
from fish_tuning import apply_mask, create_mask_from_fisher, random_scores

DEFAULT = "FISH"
PUBLISHED = "FISH, published selection"
UPPER = "FISH, upper half of the layers"
HOOKS = "gradient hooks, float masks, dense AdamW"


def ways(shape: Shape, rank: int) -> dict[str, Way]:
    """LoRA and masked variants; all but LoRA of the full rank train the same number of values."""

    def with_hooks(device: str) -> nn.Module:
        return hooked(shape, rank, device, half_mask(lora(shape, rank, "meta")))

    return {
        f"LoRA r={rank}": partial(lora, shape, rank),
        f"LoRA r={rank // 2}": partial(lora, shape, rank // 2),
        HOOKS: with_hooks,
        DEFAULT: partial(fish, shape, rank),
        PUBLISHED: partial(fish, shape, rank, scoring_point="start", scope="global"),
        UPPER: partial(fish_upper_layers, shape, rank),
    }


def half_mask(model: nn.Module, keep_ratio: float | None = None) -> dict[str, torch.Tensor]:
    """Random entries of an adapter, by default half of them, and the head."""
    scores = random_scores({name: p.shape for name, p in trainable(model).items()}, seed=0)
    budget = None if keep_ratio else half_of(model)
    return dict(create_mask_from_fisher(scores, keep_ratio, [HEAD], num_trainable=budget))


def time_of_a_step(setting: Setting) -> Iterator[Row]:
    """A step beside LoRA and gradient hooks."""
    for shape in setting.shapes:
        rounds, _ = take_steps(setting, shape, ways(shape, setting.rank), 31)
        yield from _step_rows(_case(setting, shape), rounds, setting.rank)


def time_of_peers(setting: Setting) -> Iterator[Row]:
    """A step beside PEFT's other methods."""
    for shape in setting.shapes:
        rank = setting.rank
        own = {DEFAULT: ways(shape, rank)[DEFAULT]}
        rounds, counts = take_steps(setting, shape, own | peers(shape, rank // 2), 11)
        ours = counts.pop(DEFAULT)
        for name, count in counts.items():
            row = timed(_case(setting, shape), rounds, DEFAULT, name)
            yield replace(row, against=f"{name}, {count:,} values to {ours:,}")


def _case(setting: Setting, shape: Shape) -> str:
    size, tokens = batch_for(setting, shape)["input_ids"].shape
    return f"training step, {shape.name}, batch {size} x {tokens}"


def take_steps(
    setting: Setting, shape: Shape, ways: Mapping[str, Way], rounds: int = 21
) -> tuple[Rounds, dict[str, int]]:
    """Times of steps, and the number of trained values of each contender."""
    batch = batch_for(setting, shape)
    contenders = {name: Contender.of(way(setting.device)) for name, way in ways.items()}
    taken = take_turns(
        {name: partial(each.step, batch) for name, each in contenders.items()},
        setting.rounds(rounds),
        setting.device,
        warmup=2,
    )
    return taken, {name: each.num_trainable for name, each in contenders.items()}


def batch_for(setting: Setting, shape: Shape) -> Batch:
    """A batch of a size that the device trains a shape with."""
    if setting.tiny:
        return batch_of(4, 8, setting.device)
    if setting.on_cpu:
        return batch_of(32 if shape is MINILM else 8, 32, setting.device)
    return batch_of(8 if shape is TINYLLAMA else 32, 128, setting.device)


def _step_rows(case: str, rounds: Rounds, rank: int) -> Iterator[Row]:
    full, half = f"LoRA r={rank}", f"LoRA r={rank // 2}"
    yield timed(
        case,
        rounds,
        DEFAULT,
        full,
        at_most=1,
        rest="writing the values into the storage before the pass and gathering their gradients "
        "after it, against the optimizer's work on twice as many values",
    )
    yield timed(
        case,
        rounds,
        DEFAULT,
        half,
        at_most=0.99,
        rest="matrices of twice the rank, writing the values and gathering their gradients",
    )
    yield timed(case, rounds, PUBLISHED, half, at_most=1, rest="matrices of twice the rank")
    yield timed(
        case,
        rounds,
        UPPER,
        half,
        at_most=0.9,
        rest="the forward pass of the lower layers, which nothing can leave out",
    )
    yield timed(case, rounds, DEFAULT, HOOKS, at_most=1, rest="the model's own passes")


def step_with_default_malloc(setting: Setting) -> Iterator[Row]:
    """A step in a separate process, whose C library returns freed memory to the system as usual.

    All other cases run with MALLOC_TRIM_THRESHOLD_ set (see the Makefile). Without it glibc returns
    the top of the heap to the system when enough of it is free, and the next step has to fetch
    these pages again. How much is free there depends on where small, long-lived tensors happen to
    be, which no contender controls.
    """
    if not setting.on_cpu:
        return
    full = f"LoRA r={setting.rank}"
    variables = {key: os.environ.pop(key) for key in list(os.environ) if key.startswith("MALLOC_")}
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            rounds = pool.submit(_two_ways, setting, full, DEFAULT).result()
    finally:
        os.environ.update(variables)
    yield timed(
        f"training step with glibc's default malloc, {setting.shapes[0].name}",
        rounds,
        DEFAULT,
        full,
        at_most=1,
        rest="pages of freed memory that glibc gives back after a step and fetches again in the "
        "next; with MALLOC_TRIM_THRESHOLD_ set it keeps them",
    )


def _two_ways(setting: Setting, *names: str) -> Rounds:
    shape = setting.shapes[0]
    chosen = {name: ways(shape, setting.rank)[name] for name in names}
    return take_steps(setting, shape, chosen)[0]


def growth_of_a_step(setting: Setting) -> Iterator[Row]:
    """A step by the fraction of entries that are trained."""
    shape, rank = setting.shapes[0], setting.rank
    full = f"LoRA r={rank}"

    def kept(ratio: float, device: str) -> nn.Module:
        model = lora(shape, rank, device)
        return apply_mask(model, half_mask(model, ratio))

    ratios = {f"keep ratio {ratio}": partial(kept, ratio) for ratio in (0.01, 0.1, 0.5, 0.9)}
    rounds, _ = take_steps(setting, shape, {full: partial(lora, shape, rank), **ratios})
    for name in ratios:
        yield timed(
            f"training step by keep ratio, {shape.name}",
            rounds,
            name,
            full,
            at_most=1,
            rest="writing the values before the pass and gathering their gradients after it",
        )
