"""Fisher scores of causal language models beside a plain pass: SmolLM2, and a large vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn

from benchmarks.contenders import lora
from benchmarks.measure import peak_memory, take_turns
from benchmarks.scoring import plain_pass
from benchmarks.setting import Setting
from benchmarks.shapes import LARGE_VOCABULARY, TINY_CAUSAL, Batch, Shape, texts
from benchmarks.table import Row, exact, megabytes, timed
from fish_tuning import calculate_fisher_information

OURS = "one pass"
FLOOR = "forward and backward"


def time_of_scoring_text(setting: Setting) -> Iterator[Row]:
    """Short and long texts on SmolLM2, LoRA on all linear layers."""
    shape = setting.language_model
    model = _causal(setting, shape).eval()
    size = 4 if setting.tiny else 8
    for examples, tokens in ((8, 8), (4, 16)) if setting.tiny else ((64, 64), (16, 256)):
        batches = texts(examples, size, tokens, setting.device)
        rounds = take_turns(
            {OURS: partial(_scores, model, batches), FLOOR: partial(plain_pass, model, batches)},
            setting.rounds(3),
            setting.device,
            warmup=0,  # A round takes minutes on a processor.
        )
        yield timed(
            f"scoring {examples} texts of {tokens} tokens in batches of {size}, "
            f"LoRA r={setting.rank} on all linear layers, {shape.name}",
            rounds,
            OURS,
            FLOOR,
            at_most=1.1,
            rest="hooks on two modules per linear layer, squares and sums, one example more to "
            "recognize the loss, and the first batch's comparison with autograd's gradient",
        )


def memory_of_scoring_text(setting: Setting) -> Iterator[Row]:
    """Peak memory beyond the model: as it is, with gradient checkpointing, a large vocabulary."""
    shape = setting.language_model
    size, tokens = (4, 8) if setting.tiny else (8, 64)
    model = _causal(setting, shape).eval()
    batches = texts(2 * size, size, tokens, setting.device)
    case = f"peak memory of scoring, {shape.name}, batch {size} x {tokens}"
    yield _peaks(setting, case, FLOOR, model, batches)

    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    step = "forward and backward of a training step with it"
    yield _peaks(setting, f"{case}, gradient checkpointing", step, model, batches)

    shape = TINY_CAUSAL if setting.tiny else LARGE_VOCABULARY
    tokens = 16 if setting.tiny else 2048
    model = _causal(setting, shape).eval()
    case = f"peak memory of scoring, {shape.name}, batch 1 x {tokens:,}"
    yield _peaks(setting, case, FLOOR, model, texts(2, 1, tokens, setting.device))


def _causal(setting: Setting, shape: Shape) -> Any:
    return lora(shape, setting.rank, setting.device, init_lora_weights=False)


def _scores(model: nn.Module, batches: list[Batch]) -> object:
    return calculate_fisher_information(model, batches, progress=False)


def _peaks(
    setting: Setting, case: str, against: str, model: nn.Module, batches: list[Batch]
) -> Row:
    def peak(run: Callable[[nn.Module, list[Batch]], object]) -> int:
        return peak_memory(partial(run, model, batches), setting.device)

    plain, ours = peak(plain_pass), peak(_scores)
    return Row(
        case,
        against,
        f"{megabytes(ours)} against {megabytes(plain)}",
        exact(ours / plain),
        at_most=1.1,
        rest="the sums of the scores, and on the first batch autograd's own gradients",
    )
