"""A training step of language models beside LoRA and PEFT's other methods, and its memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

from benchmarks.contenders import Contender, Way, fish, lora, peers
from benchmarks.measure import Rounds, take_turns
from benchmarks.setting import Setting
from benchmarks.shapes import (
    SMOLLM2,
    TINY_CAUSAL,
    TINYLLAMA_LAYER,
    Batch,
    Shape,
    packed,
    padded,
    texts,
)
from benchmarks.table import Row, exact, megabytes, timed
from benchmarks.training import DEFAULT
from benchmarks.training_memory import peak_of_training

REST = (
    "matrices of twice the rank, writing the values and gathering their gradients, and one "
    "parameter per tensor for the optimizer"
)


def time_of_a_step_on_text(setting: Setting) -> Iterator[Row]:
    """Texts that are padded, and packed into one row, on SmolLM2; and one wide layer."""
    half = f"LoRA r={setting.rank // 2}"
    for shape in [TINY_CAUSAL] if setting.tiny else [SMOLLM2, TINYLLAMA_LAYER]:
        ways = _ways(shape, setting.rank)
        contenders = {name: Contender.of(way(setting.device)) for name, way in ways.items()}
        with_padding = _padded_texts(setting, shape)
        for kind, batch in (("padded", with_padding), ("packed", packed(with_padding))):
            rounds = _take_steps(setting, contenders, batch)
            for other in (name for name in ways if name != DEFAULT):
                yield timed(
                    f"{_case('training step', shape, batch)}, {kind}",
                    rounds,
                    DEFAULT,
                    other,
                    at_most=1,
                    rest=REST if other == half else "writing the values and gathering gradients",
                )


def time_of_peers_on_text(setting: Setting) -> Iterator[Row]:
    """Padded texts, beside PEFT's other methods."""
    shape, rank = setting.language_model, setting.rank
    ways = {DEFAULT: _ways(shape, rank)[DEFAULT], **peers(shape, rank // 2)}
    contenders = {name: Contender.of(way(setting.device)) for name, way in ways.items()}
    batch = _padded_texts(setting, shape)
    rounds = _take_steps(setting, contenders, batch)
    ours = contenders.pop(DEFAULT).num_trainable
    for name, each in contenders.items():
        row = timed(_case("training step", shape, batch), rounds, DEFAULT, name)
        yield replace(row, against=f"{name}, {each.num_trainable:,} values to {ours:,}")


def memory_of_training_on_text(setting: Setting) -> Iterator[Row]:
    """Peak bytes of all contenders, against LoRA with as many trainable values."""
    shape, rank = setting.language_model, setting.rank
    batch, half = _padded_texts(setting, shape), f"LoRA r={rank // 2}"
    ways = {**_ways(shape, rank), **peers(shape, rank // 2)}
    peaks = {name: peak_of_training(way, batch, setting.device) for name, way in ways.items()}
    for name in (name for name in peaks if name != half):
        yield Row(
            f"{_case('peak memory in training', shape, batch)}: {name}",
            half,
            f"{megabytes(peaks[name])} against {megabytes(peaks[half])}",
            exact((peaks[name] - peaks[half]) / 1e6),
            at_most=1 if name == DEFAULT else None,
            unit=" MB",
            rest="entries that stay frozen, the trained values beside their places in the tensors, "
            "their index, their numbers when both last agreed, and activations of twice as many "
            "ranks",
        )


def _ways(shape: Shape, rank: int) -> dict[str, Way]:
    return {
        f"LoRA r={rank}": partial(lora, shape, rank),
        f"LoRA r={rank // 2}": partial(lora, shape, rank // 2),
        DEFAULT: partial(fish, shape, rank),
    }


def _padded_texts(setting: Setting, shape: Shape) -> Batch:
    if setting.tiny:
        size, tokens = 2, 8
    elif setting.on_cpu:
        size, tokens = (4, 128) if shape is SMOLLM2 else (2, 256)
    else:
        size, tokens = 16, 512
    return padded(texts(size, size, tokens, setting.device)[0])


def _take_steps(setting: Setting, contenders: Mapping[str, Contender], batch: Batch) -> Rounds:
    steps = {name: partial(each.step, batch) for name, each in contenders.items()}
    return take_turns(steps, setting.rounds(7), setting.device)


def _case(what: str, shape: Shape, batch: Batch) -> str:
    size, tokens = batch["input_ids"].shape
    return f"{what}, {shape.name}, batch {size} x {tokens}"
