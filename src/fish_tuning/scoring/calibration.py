"""One pass over a calibration set: the mean of powers of per-example gradients."""

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fish_tuning.arguments import check_integer
from fish_tuning.engines import check_in_memory, device_of, is_in_zero_3
from fish_tuning.parts import is_divided
from fish_tuning.per_example.sums import GradientSums
from fish_tuning.scoring import zero3
from fish_tuning.scoring.evaluating import evaluating
from fish_tuning.scoring.inputs.batches import Batch, batch_size, take
from fish_tuning.scoring.inputs.padding import parts_by_length
from fish_tuning.scoring.inputs.reading import check_loader
from fish_tuning.scoring.inputs.unpacking import Unpacker
from fish_tuning.scoring.objective import Objective
from fish_tuning.scoring.processes import Processes
from fish_tuning.scoring.quantized import keep_differentiable
from fish_tuning.scoring.scorers import BatchScorer
from fish_tuning.sharded_model import ShardedModel

logger = logging.getLogger(__name__)

CPU_PART = 8
"""Examples of a padded batch that a CPU scores at a time. Its time grows with the tokens, and
parts of similar length have little padding; an accelerator is faster with the whole batch."""


def mean_over_examples(
    parameters: Mapping[str, nn.Parameter],
    objective: Objective,
    calibration_dataloader: Iterable[Batch],
    device: torch.device | str | None,
    num_samples: int | None,
    progress: bool,
) -> tuple[dict[str, Tensor], int]:
    """1/N sum_i sum_j |d loss_ij / d theta|^power, over examples i and the losses j of each.

    The model, its modes and the random number generators are left as they were.

    Args:
        parameters: The parameters to score, by name.
        objective: The losses, and the power.
        calibration_dataloader: Batches.
        device: Where to move the model first; nowhere if None.
        num_samples: How many examples to use; all if None.
        progress: Whether to show a progress bar.

    Returns:
        The means by parameter name, divided as the parameters are, and the number of examples N.

    Raises:
        ValueError: `num_samples` is out of range, there is no example or no label, or the
            processes have different parameters or batches.
        RuntimeError: Another process failed.
        torch.OutOfMemoryError: A single example does not fit in memory.
    """
    _check_number(num_samples)
    check_loader(calibration_dataloader)
    model = objective.forward.model
    if device is not None:
        _check_device(device)
        model.to(device)
    sharded = ShardedModel(model)
    sums = GradientSums(parameters, objective.power, sharded)
    processes = Processes(
        {name: p for name, p in parameters.items() if not is_divided(p)},
        device_of(model),
        dividing=not objective.one_at_a_time,
        together=sums.divided or any(map(is_in_zero_3, model.parameters())),
    )
    hidden = not progress or processes.rank > 0
    bar = tqdm(total=num_samples, desc="Fisher", unit="example", disable=hidden)
    scorer: BatchScorer | None = None
    count = 0
    on_cpu = next(iter(parameters.values())).device.type == "cpu"
    unpack = Unpacker(objective.forward)
    keep_differentiable(model)
    sharing = processes.sharing(calibration_dataloader)
    with sharded.scoring(), zero3.gathering(model), evaluating(model), sharing as batches, bar:
        for own, batch in batches:
            batch = objective.read(batch)
            if batch_size(batch) == 0:
                continue
            batch, most_tokens = unpack(batch)
            batch = _first(objective.forward.on_device(batch), num_samples, count)
            numbers = range(count, count + batch_size(batch))
            if scorer is None and objective.has_label(batch):
                scorer = BatchScorer(objective, sums, batch, numbers, processes.agreed)
            if scorer is not None and own:
                for part, of_part in _parts(batch, numbers, objective, on_cpu, most_tokens):
                    scorer.add(part, of_part)
            count = numbers.stop
            bar.update(len(numbers))
            if count == num_samples:
                break
        bar.total = count  # There may be fewer examples than were asked for.
        if scorer is None:
            raise ValueError(_nothing_scored(count))
    processes.add(sums.totals.values())
    if num_samples is not None and count < num_samples:
        logger.warning("num_samples=%d, but there were only %d examples", num_samples, count)
    means = {name: total.div_(count) for name, total in sums.totals.items()}
    return {name: sums.parts[name].divided(mean) for name, mean in means.items()}, count


def _check_number(num_samples: int | None) -> None:
    if num_samples is not None:
        check_integer("num_samples", num_samples)
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples}: must be at least 1, or None")


def _check_device(device: torch.device | str) -> None:
    try:
        torch.empty(0, device=device)
    # Backends that are not there raise assertions, among others.
    except (AssertionError, RuntimeError, TypeError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"device={device!r} cannot be used: name one that this machine has, such as 'cpu', "
            f"'cuda' or 'mps', or leave it out ({reason})"
        ) from error


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that can be scored, by name.

    Raises:
        ValueError: There are none, or some are offloaded.
    """
    sharded = ShardedModel(model)
    sharded.settle()
    parameters = {
        sharded.name_of(name): p for name, p in model.named_parameters() if p.requires_grad
    }
    if not parameters:
        raise ValueError(
            "the model has no trainable parameter: add an adapter, or set requires_grad on what "
            "is to be scored"
        )
    check_in_memory(parameters)
    return parameters


def _nothing_scored(count: int) -> str:
    if count:
        return f"all labels of the {count} calibration examples are -100"
    return "the calibration dataloader is empty: give at least one example"


def _first(batch: Batch, num_samples: int | None, count: int) -> Batch:
    """The part of a batch that is still wanted after `count` examples."""
    if num_samples is None or count + batch_size(batch) <= num_samples:
        return batch
    return take(batch, slice(num_samples - count))


def _parts(
    batch: Batch,
    numbers: Sequence[int],
    objective: Objective,
    on_cpu: bool,
    most_tokens: int | None,
) -> Iterable[tuple[Batch, Sequence[int]]]:
    """The parts in which a batch is scored, with the numbers of their examples."""
    most_examples = CPU_PART if on_cpu else None
    if not objective.divisible or most_examples is most_tokens is None:
        return [(batch, numbers)]
    if most_tokens is None and not objective.padding.may_be_cut(batch):
        return [(batch, numbers)]
    return parts_by_length(batch, numbers, most_examples, most_tokens)
