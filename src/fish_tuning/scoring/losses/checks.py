"""Checks of losses."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fish_tuning.config import Estimator, TokenReduction
from fish_tuning.scoring.inputs.batches import Batch
from fish_tuning.scoring.inputs.labels import copies_input
from fish_tuning.scoring.losses.likelihood import Likelihood, Tokens
from fish_tuning.scoring.losses.recognition import adds_up


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


def check_own_loss(
    own: Tensor | None,
    estimator: Estimator,
    reduction: TokenReduction,
    logits: object,
    labels: object,
    *,
    certain: bool = True,
) -> None:
    """Checks that the model's own loss can be scored where no likelihood agrees with it.

    Args:
        own: The model's own loss, if it returns one.
        estimator: As in `calculate_fisher_information`.
        reduction: The `token_reduction` of `calculate_fisher_information`.
        logits: The shape of the logits, for the message.
        labels: The shape of the labels, for the message.
        certain: Whether it is certain that this number is the loss.

    Raises:
        ValueError: There is no such loss, or an option needs a likelihood.
    """
    if own is None:
        raise ValueError(
            f"no likelihood fits logits of shape {logits} and labels of shape {labels}, and "
            "the model returns no loss: pass a loss_fn(outputs, batch)"
        )
    if not certain:
        raise ValueError(
            "the model returns its logits and then a number, which agrees with no known loss, so "
            "it is not certain that it is the loss: return (loss, logits) or a mapping with "
            "'loss', or pass a loss_fn(outputs, batch)"
        )
    if estimator == "true" or reduction == "sum":
        raise ValueError(
            "the model's own loss is not one of the known likelihoods; score it with "
            "estimator='empirical' and token_reduction='mean', or pass a loss_fn"
        )


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


def check_alone(number: int, alone: float, within: float, tolerance: float) -> None:
    """Checks that an example has the same loss alone and within its batch.

    Args:
        number: The number of the example, for the message.
        alone: The model's own loss of the example alone.
        within: Its loss from the outputs for its batch.
        tolerance: The relative difference that is allowed; at least 1%.

    Raises:
        ValueError: The losses differ.
    """
    if abs(alone - within) > max(1e-2, tolerance) * abs(alone) + 1e-4:
        raise ValueError(
            f"calibration example {number} has the loss {alone:.6g} alone and {within:.6g} "
            "within its batch: the model mixes the examples of a batch, or an entry of the "
            "batch is not divided by example: use batches of one example (batch_size=1)"
        )


def check_adds_up(alone: Tensor, labels: Any, together: Tensor, tolerance: float) -> None:
    """Checks that the losses of single examples add up to the loss of their batch.

    Args:
        alone: The model's own loss of each example alone, (b,).
        labels: The labels of the batch.
        together: The model's own loss of the batch.
        tolerance: The relative difference that is allowed.

    Raises:
        ValueError: They do not add up.
    """
    if adds_up(alone.to(together), labels, together, tolerance):
        return
    raise ValueError(
        f"the model's loss of {len(alone)} examples is {float(together):.6g}, and the losses that "
        f"it gives each of them alone, {float(alone.mean()):.6g} on average, do not add up to it: "
        "it is not the mean of its examples' losses, but counts some more than others (more boxes, "
        "pixels or tokens; class weights) or compares them (a router's balance, in-batch "
        "negatives). Use batches of one example (batch_size=1, or per_device_train_batch_size=1) "
        "to score each by the loss that it has alone. Leave that term out "
        "(output_router_logits=False), or pass a loss_fn(outputs, batch) with one loss per example"
    )
