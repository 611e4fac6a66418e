"""A training step and its memory beside LoRA, gradient hooks and PEFT's other methods."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from benchmarks.contenders import (
    HEAD,
    Contender,
    Way,
    fish,
    fish_half_the_ranks,
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
RANKS = "FISH, half of the ranks"
HOOKS = "gradient hooks, float masks, dense AdamW"


def ways(shape: Shape, rank: int) -> dict[str, Way]:
    """All contenders; all but dense LoRA of the full rank train the same number of values."""

    def with_hooks(device: str) -> nn.Module:
        return hooked(shape, rank, device, half_mask(lora(shape, rank, "meta")))

    return {
        f"LoRA r={rank}": partial(lora, shape, rank),
        f"LoRA r={rank // 2}": partial(lora, shape, rank // 2),
        HOOKS: with_hooks,
        DEFAULT: partial(fish, shape, rank),
        PUBLISHED: partial(fish, shape, rank, scoring_point="start", scope="global"),
        UPPER: partial(fish_upper_layers, shape, rank),
        RANKS: partial(fish_half_the_ranks, shape, rank),
        **peers(shape, rank // 2),
    }


def half_mask(model: nn.Module, keep_ratio: float | None = None) -> dict[str, torch.Tensor]:
    """Random entries of an adapter, by default half of them, and the head."""
    scores = random_scores({name: p.shape for name, p in trainable(model).items()}, seed=0)
    budget = None if keep_ratio else half_of(model)
    return dict(create_mask_from_fisher(scores, keep_ratio, [HEAD], num_trainable=budget))


def time_of_a_step(setting: Setting) -> Iterator[Row]:
    """A step of all contenders."""
    for shape in setting.shapes:
        batch = _batch(setting, shape)
        contenders = {
            name: Contender.of(way(setting.device))
            for name, way in ways(shape, setting.rank).items()
        }
        rounds = take_turns(
            {name: partial(each.step, batch) for name, each in contenders.items()},
            setting.rounds(21 if shape is MINILM else 11),
            setting.device,
            warmup=2,
        )
        size, tokens = batch["input_ids"].shape
        case = f"training step, {shape.name}, batch {size} x {tokens}"
        counts = {name: each.num_trainable for name, each in contenders.items()}
        yield from _step_rows(case, rounds, counts, setting.rank)


def _step_rows(case: str, rounds: Rounds, counts: dict[str, int], rank: int) -> Iterator[Row]:
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
        at_most=1,
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
    yield timed(
        case,
        rounds,
        RANKS,
        half,
        at_most=0.9,
        rest="what is left is LoRA of half the rank itself: its products are the same, and the "
        "narrow matrices are cut out anew in each pass",
    )
    yield timed(case, rounds, DEFAULT, HOOKS, at_most=1, rest="the model's own passes")
    for name, count in counts.items():
        if name not in (full, half, HOOKS, DEFAULT, PUBLISHED, UPPER, RANKS):
            row = timed(case, rounds, DEFAULT, name)
            yield replace(row, against=f"{name}, {count:,} values to {counts[DEFAULT]:,}")


def growth_of_a_step(setting: Setting) -> Iterator[Row]:
    """A step by the fraction of entries that are trained."""
    shape = setting.shapes[0]
    rank, batch = setting.rank, _batch(setting, shape)
    ratios = (0.01, 0.1, 0.5, 0.9)
    contenders = {f"LoRA r={rank}": Contender.of(lora(shape, rank, setting.device))}
    for ratio in ratios:
        model = lora(shape, rank, setting.device)
        contenders[f"keep ratio {ratio}"] = Contender.of(apply_mask(model, half_mask(model, ratio)))
    rounds = take_turns(
        {name: partial(each.step, batch) for name, each in contenders.items()},
        setting.rounds(15),
        setting.device,
        warmup=2,
    )
    case = f"training step by keep ratio, {shape.name}"
    for ratio in ratios:
        yield timed(
            case,
            rounds,
            f"keep ratio {ratio}",
            f"LoRA r={rank}",
            at_most=1,
            rest="writing the values before the pass and gathering their gradients after it",
        )


def _batch(setting: Setting, shape: Shape) -> Batch:
    if setting.tiny:
        return batch_of(4, 8, setting.device)
    if setting.on_cpu:
        return batch_of(32 if shape is MINILM else 8, 32, setting.device)
    return batch_of(8 if shape is TINYLLAMA else 32, 128, setting.device)
