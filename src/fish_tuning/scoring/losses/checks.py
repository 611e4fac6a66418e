"""Checks of losses."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fish_tuning.scoring.inputs.batches import Batch
from fish_tuning.scoring.inputs.labels import copies_input
from fish_tuning.scoring.losses.likelihood import Likelihood, Tokens

UNCERTAIN_LOSS = (
    "the model returns its logits and then a number, which agrees with no known loss, so it is not "
    "certain that it is the loss: return (loss, logits) or a mapping with 'loss', or pass a "
    "loss_fn(outputs, batch)"
)


def check_finite(losses: Tensor, numbers: Sequence[int]) -> None:
    """Checks that no loss is NaN or infinite.

    Args:
        losses: One loss per example.
        numbers: The numbers of the examples, for the message.

    Raises:
        ValueError: One is.
    """
    losses = losses.detach()
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        i = int(bad[0])
        raise ValueError(
            f"the loss of calibration example {numbers[i]} is {float(losses[i])}: look at its "
            "inputs and labels, and at the model's weights (half precision overflows easily)"
        )


def check_shift(kinds: Sequence[Likelihood], own: Tensor | None, batch: Batch) -> None:
    """Checks that the labels of a batch show which logits predict them, if no loss does.

    Args:
        kinds: Likelihoods that fit the shapes of logits and labels.
        own: The model's own loss.
        batch: The batch.

    Raises:
        ValueError: They are the input's tokens: this token may be predicted, or the next one.
    """
    if own is None and Tokens(shifted=True) in kinds and copies_input(batch):
        raise ValueError(
            "the labels are the tokens of the input, and the model returns no loss that tells "
            "whether its logits predict this token or the next: return the loss if forward is "
            "given labels, or pass a loss_fn(outputs, batch)"
        )


def scalar(loss: Tensor) -> Tensor:
    """The model's own loss of one example as a scalar.

    Raises:
        ValueError: It is not one number.
    """
    if loss.numel() != 1:
        raise ValueError(
            f"the model returns a loss of shape {tuple(loss.shape)} for one example, and one "
            "number is needed: pass a loss_fn(outputs, batch)"
        )
    return loss.reshape(())


def check_independent(losses: Tensor, logits: Any) -> None:
    """Checks that a loss_fn computes an example's loss from the outputs for that example.

    Raises:
        ValueError: It uses the outputs for other examples too.
    """
    size = len(losses)
    if not isinstance(logits, Tensor) or logits.shape[:1] != (size,):
        return
    if not (logits.requires_grad and losses.requires_grad and bool(losses.isfinite().all())):
        return
    for example in (0, size - 1):
        (gradient,) = torch.autograd.grad(
            losses[example], logits, retain_graph=True, allow_unused=True
        )
        others = [row for row in range(size) if row != example]
        if gradient is not None and bool(gradient[others].any()):
            raise ValueError(
                "loss_fn computes the loss of an example from the outputs for other examples "
                "(in-batch negatives?), so that no example has a loss of its own: use batches of "
                "one example (batch_size=1), or a loss_fn that needs no others"
            )
