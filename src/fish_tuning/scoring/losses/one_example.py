"""The outputs of a model for one example of a batch, and why it fails with one."""

from typing import Any

import torch
from torch import Tensor

from fish_tuning.per_example.memory import is_out_of_memory
from fish_tuning.scoring.inputs.batches import Batch, batch_size, described
from fish_tuning.scoring.inputs.forward import Forward
from fish_tuning.scoring.inputs.labels import labels_of
from fish_tuning.scoring.inputs.outputs import logits_of
from fish_tuning.scoring.losses.likelihood import check_classes

_ERRORS = (AssertionError, LookupError, RuntimeError, TypeError, ValueError)


def outputs_of_one(forward: Forward, one: Batch, batch: Batch, *, with_labels: bool) -> Any:
    """The outputs for one example.

    Args:
        forward: Calls the model.
        one: The example.
        batch: The batch that it was taken from.
        with_labels: Whether the model computes its own loss.

    Raises:
        ValueError: A label is not one of the model's classes, or the model takes the batch, but not
            the example.
    """
    try:
        return forward(one, with_labels=with_labels)
    except _ERRORS as error:
        check_division(error, forward, batch)
        if with_labels and isinstance(error, IndexError):
            check_labels(forward, one)
        raise


def check_division(error: Exception, forward: Forward, batch: Batch) -> None:
    """Checks that a model which fails with one example of a batch fails with the batch, too.

    Args:
        error: What the model raised for the example.
        forward: Calls the model.
        batch: The batch.

    Raises:
        ValueError: The model takes the batch, so that it is divided wrongly.
    """
    if batch_size(batch) > 1 and not is_out_of_memory(error) and _takes(forward, batch):
        raise ValueError(
            f"the model takes a calibration batch ({described(batch)}) but not a single example of "
            "it: an entry has as many rows or items as there are examples, and they are something "
            "else (weights of classes, images, several inputs); use batches of one example "
            f"(batch_size=1) ({error})"
        ) from error


@torch.no_grad()
def _takes(forward: Forward, batch: Batch) -> bool:
    try:
        forward(batch, with_labels=True)
    except _ERRORS:
        return False
    return True


def check_labels(forward: Forward, batch: Batch) -> None:
    """Checks, after a model has failed, that integer labels are its classes.

    Raises:
        ValueError: A label is not.
    """
    labels = labels_of(batch)
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        logits = logits_of(forward(batch, with_labels=False))
        if isinstance(logits, Tensor):
            check_classes(logits, labels)
