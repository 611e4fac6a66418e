"""Fisher scores beside a plain forward and backward pass, which is their floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders import lora, trainable
from benchmarks.measure import peak_memory, take_turns
from benchmarks.setting import Setting
from benchmarks.shapes import MINILM, TINY, Batch, batch_of, one_by_one, sentences
from benchmarks.table import Row, exact, megabytes, timed
from fish_tuning import calculate_fisher_information, score_with_perturbed_b

OURS = "one pass"
FLOOR = "forward and backward"
LOOP = "one example at a time, without padding"


def time_of_scoring(setting: Setting) -> Iterator[Row]:
    """128 examples: the library, a plain pass over the same batches, one example at a time."""
    examples, size = (8, 4) if setting.tiny else (128, 32)
    for shape in setting.shapes:
        model = lora(shape, setting.rank, setting.device).eval()
        padded = sentences(examples, size, setting.device)
        equal = [batch_of(size, 32, setting.device, seed) for seed in range(examples // size)]
        runs = {"padded": padded, "equal": equal}
        contenders: dict[str, Callable[[], object]] = {LOOP: partial(naive_scores, model, padded)}
        for name, batches in runs.items():
            contenders[f"{OURS}, {name}"] = partial(scores, model, batches)
            contenders[f"{FLOOR}, {name}"] = partial(plain_pass, model, batches)
        rounds = take_turns(contenders, setting.rounds(9 if shape is MINILM else 5), setting.device)
        case = (
            f"scoring {examples} examples in batches of {size}, LoRA r={setting.rank}, {shape.name}"
        )
        goal = 1.05 if setting.on_cpu else 1.2
        for name in runs:
            yield timed(
                case,
                rounds,
                f"{OURS}, {name}",
                f"{FLOOR}, {name}",
                at_most=goal,
                rest="products of inputs and output gradients, squares and sums, one example more "
                "to recognize the loss, and the first batch's comparison with autograd's gradient",
            )
        yield timed(
            case,
            rounds,
            LOOP,
            f"{OURS}, padded",
            at_least=3 if setting.on_cpu else 10,
            rest="the loop has no padding at all, and a processor multiplies the matrices of one "
            "sentence nearly as fast, token by token, as those of eight",
        )


def memory_of_scoring(setting: Setting) -> Iterator[Row]:
    """Peak memory beyond the model: against a plain pass, by number of examples, of wide layers."""
    shape = setting.base
    model = lora(shape, setting.rank, setting.device).eval()
    size, tokens = (4, 8) if setting.tiny else (32, 32)
    batches = [batch_of(size, tokens, setting.device, seed) for seed in range(4)]

    def peak(run: Callable[[], object]) -> int:
        return peak_memory(run, setting.device)

    plain = peak(partial(plain_pass, model, batches))
    few = peak(partial(scores, model, batches[:2]))
    many = peak(partial(scores, model, batches))
    case = f"peak memory of scoring, LoRA r={setting.rank}, {shape.name}, batch {size} x {tokens}"
    yield Row(
        f"{case}: {4 * size} examples",
        "forward and backward",
        f"{megabytes(many)} against {megabytes(plain)}",
        exact(many / plain),
        at_most=1.1,
    )
    yield Row(
        f"{case}: {4 * size} examples",
        f"{2 * size} examples",
        f"{megabytes(many)} against {megabytes(few)}",
        exact(many / few),
        at_most=1.0,
    )
    width = 64 if setting.tiny else 4096
    with torch.device(setting.device):
        wide = nn.Linear(width, width, bias=False)
        inputs = [(torch.randn(size, 8, width), torch.zeros(size, 8, width)) for _ in range(2)]

    def loss(outputs: Any, batch: Any) -> Tensor:
        losses: Tensor = (outputs - batch[1]).square().mean((1, 2))
        return losses

    held = peak(partial(calculate_fisher_information, wide, inputs, loss_fn=loss, progress=False))
    together = size * 4 * width**2
    yield Row(
        f"peak memory of scoring a {width} x {width} weight, batch {size}",
        "per-example gradients of a batch at once",
        f"{megabytes(held)} against {megabytes(together)}",
        exact(held / together),
    )


def growth_of_scoring(setting: Setting) -> Iterator[Row]:
    """Time per example and per token as their number grows."""
    shape = TINY if setting.tiny else MINILM
    model = lora(shape, setting.rank, setting.device).eval()
    few, many = (8, 16) if setting.tiny else (32, 256)
    short, long = (8, 16) if setting.tiny else (16, 128)
    device, size = setting.device, few

    def times(examples: int, tokens: int) -> Callable[[], object]:
        batches = [batch_of(size, tokens, device, seed) for seed in range(examples // size)]
        return partial(scores, model, batches)

    rounds = take_turns(
        {
            "few": times(few, 32),
            "many": times(many, 32),
            "short": times(few, short),
            "long": times(few, long),
        },
        setting.rounds(9),
        device,
    )
    for case, large, small, factor in (
        (f"scoring time per example, {shape.name}", "many", "few", many / few),
        (f"scoring time per token, {shape.name}", "long", "short", long / short),
    ):
        of = {"few": few, "many": many, "short": short, "long": long}
        unit = "examples" if large == "many" else "tokens"
        row = timed(case, rounds, large, small)
        yield Row(
            f"{case}: {of[large]} {unit}",
            f"{of[small]} {unit}",
            row.figure,
            type(row.ratio)(*(q / factor for q in vars(row.ratio).values())),
            at_most=1.1,
            rest="attention, whose work grows with the square of the tokens",
        )


def scores(model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """The scores that `FishConfig` uses by default."""
    return score_with_perturbed_b(model, batches, progress=False)


def plain_pass(model: nn.Module, batches: list[Batch]) -> None:
    """What any gradient costs: forward and backward over all batches, as they are padded."""
    for batch in batches:
        model(**batch).loss.backward()
    model.zero_grad()


def naive_scores(model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """Squared gradients of one example after another, each without padding."""
    parameters = trainable(model)
    singles = one_by_one(batches)
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for batch in singles:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            sums[name] += parameter.grad.square()
    model.zero_grad()
    return {name: total / len(singles) for name, total in sums.items()}
