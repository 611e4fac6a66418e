"""One pass over a calibration set: the mean of a reduction of per-example gradients."""

import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fish_tuning.engines import check_in_memory, device_of
from fish_tuning.per_example.reduction import Reduction
from fish_tuning.scoring.batches import Batch, Forward, batch_size, parts_by_length, take
from fish_tuning.scoring.likelihood import TokenReduction
from fish_tuning.scoring.objective import Estimator, LossFunction, Objective
from fish_tuning.scoring.processes import Processes
from fish_tuning.scoring.scorers import Sums, scorer_for

logger = logging.getLogger(__name__)

CPU_PART = 8
"""Examples of a padded batch that a processor scores at a time: it takes as long as there are
tokens, where an accelerator takes as long as there are kernels."""


def mean_over_examples(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    calibration_dataloader: Iterable[Batch],
    reduction: Reduction,
    device: torch.device | str | None = None,
    *,
    estimator: Estimator = "empirical",
    num_samples: int | None = None,
    label_samples: int | None = None,
    token_reduction: TokenReduction = "mean",
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Tensor]:
    """1/N sum_i r(d log p(y | x_i) / d theta), for a reduction r of single examples' gradients.

    Model, modes and random number generators are given back as they were.

    Args:
        model: The bare model.
        parameters: Those of its trainable parameters that are wanted, by name.
        calibration_dataloader: As in `calculate_fisher_information`, and so all that follows.
        reduction: What is kept of a gradient.
        device: As there.
        estimator: As there.
        num_samples: As there.
        label_samples: As there.
        token_reduction: As there.
        loss_fn: As there.
        seed: As there.
        progress: As there.

    Returns:
        The means by parameter name.

    Raises:
        ValueError: As there.
        RuntimeError: As there.
        torch.OutOfMemoryError: As there.
    """
    check_choice("estimator", estimator, get_args(Estimator))
    check_choice("token_reduction", token_reduction, get_args(TokenReduction))
    for name, number in (("num_samples", num_samples), ("label_samples", label_samples)):
        if number is not None and number < 1:
            raise ValueError(f"{name}={number}: at least 1, or None")
    if device is not None:
        model.to(device)
    parameters = dict(parameters)
    objective = Objective(
        Forward(model),
        estimator=estimator,
        power=reduction.power,
        label_samples=label_samples,
        token_reduction=token_reduction,
        loss_fn=loss_fn,
        seed=seed,
    )
    sums: Sums | None = None
    count = 0
    on_cpu = next(iter(parameters.values())).device.type == "cpu"
    processes = Processes(parameters)
    bar = tqdm(
        total=num_samples,
        desc="Fisher",
        unit="example",
        disable=not progress or processes.rank > 0,
    )
    with _borrowed(model), processes.sharing(calibration_dataloader) as batches, bar:
        for own, batch in batches:
            batch = objective.forward.on_device(batch)
            size = batch_size(batch)
            if num_samples is not None and count + size > num_samples:
                size = num_samples - count
                batch = take(batch, slice(size))
            if sums is None and objective.has_label(batch):
                scorer = scorer_for(model, parameters, objective, reduction, batch)
                sums = Sums(scorer, loss_fn is None)
            if sums is not None and own:
                numbers = range(count, count + size)
                parts: Iterable[tuple[Batch, Sequence[int]]] = [(batch, numbers)]
                if loss_fn is None and on_cpu:
                    parts = parts_by_length(batch, numbers, CPU_PART)
                for part, of_part in parts:
                    sums.add(part, of_part)
            count += size
            bar.update(size)
            if count == num_samples:
                break
        if count == 0:
            raise ValueError("the calibration dataloader is empty: give at least one example")
        if sums is None:
            raise ValueError(f"all labels of the {count} calibration examples are -100")
    totals = sums.scorer.sums
    processes.add(totals.values())
    if num_samples is not None and count < num_samples:
        logger.warning("num_samples=%d, but there were only %d examples", num_samples, count)
    return {name: total.div_(count) for name, total in totals.items()}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that can be scored, by name.

    Raises:
        ValueError: There is none, or some are offloaded.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(
            "the model has no trainable parameter: add an adapter, or set requires_grad on what "
            "is to be scored"
        )
    check_in_memory(parameters)
    return parameters


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raises ValueError unless an argument has one of the values allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, allowed))}")


@contextmanager
def _borrowed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients; modes and random number generators are given back."""
    modes = {module: module.training for module in model.modules()}
    states = random.getstate(), np.random.get_state()
    device = device_of(model)
    with (
        torch.random.fork_rng(
            devices=[] if device.type == "cpu" else [device], device_type=device.type
        ),
        torch.enable_grad(),
    ):
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes.items():
                if module.training != mode:
                    module.training = mode
            random.setstate(states[0])
            np.random.set_state(states[1])
