"""Which likelihood a model is trained with, by comparing with the loss that it returns."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fish_tuning.engines import device_of
from fish_tuning.scoring.inputs.batches import IGNORED
from fish_tuning.scoring.inputs.precision import coarsest_eps
from fish_tuning.scoring.losses.likelihood import (
    LIKELIHOODS,
    Likelihood,
    MultiLabel,
    Regression,
    Tokens,
)
from fish_tuning.scoring.losses.own_loss import projected

CHUNK_ENTRIES = 2**22
"""Most logits whose gradient is computed at a time."""


def fitting(
    logits: Tensor, labels: Tensor, own: Tensor | None, all_labels: Any
) -> list[Likelihood]:
    """The likelihoods that one example may have, the likelier first.

    Args:
        logits: The logits of the example.
        labels: Its labels.
        own: The model's own loss of it. None of them fits if it has another term.
        all_labels: The labels of the whole batch.
    """
    kinds = [kind for kind in LIKELIHOODS if kind.fits(logits, labels)]
    if own is not None:
        return [] if _has_another_term(own, logits) else kinds
    if Regression() in kinds and (logits.shape[-1] == 1 or not _is_binary(all_labels)):
        # transformers also treats a single output as regression.
        return [kind for kind in kinds if kind != MultiLabel()]
    return kinds


def explains(likelihood: Likelihood, logits: Tensor, labels: Tensor, own: Tensor) -> bool:
    """Whether the losses of a batch's examples add up to the model's own loss of the batch.

    They do if the own loss is their mean, their sum or the mean over all labels of the batch (over
    tokens, for a language model), in value and in gradient, and has no other term. Weights of
    classes, examples or tokens, a router's loss, and whatever compares the examples of a batch do
    not pass.
    """
    if isinstance(likelihood, Tokens):
        likelihood = replace(likelihood, reduction="mean")
    if _has_another_term(own, logits):
        return False
    gradient = _gradient(own, logits)
    with torch.no_grad():
        losses = likelihood.losses(logits, labels)
    tolerance = tolerance_of(own, logits)
    return any(
        _is_close(own, (weights * losses).sum(), tolerance)
        and (gradient is None or _rows_agree(likelihood, logits, labels, gradient, weights))
        for weights in _weightings(likelihood.counts(logits, labels))
    )


def adds_up(losses: Tensor, labels: Any, own: Tensor, tolerance: float) -> bool:
    """Whether the losses (b,) of single examples add up to that of their batch, in value.

    Args:
        losses: The losses.
        labels: The labels of the batch.
        own: The model's own loss of the batch.
        tolerance: The relative difference that is allowed, as of `rounding`.
    """
    counts = [torch.ones_like(losses)]
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        by_example = (labels != IGNORED).reshape(len(labels), -1)
        counts += [by_example.sum(1)]
        if labels.dim() > 1:
            counts += [by_example[:, 1:].sum(1)]  # Nothing predicts the first token.
    return any(
        abs(float((weights * losses).sum() - own)) <= tolerance * float(own.abs()) + 1e-6
        for count in counts
        for weights in _weightings(count.to(losses))
    )


def rounding(model: nn.Module) -> float:
    """The relative difference that rounding may make between an example alone and in a batch."""
    if getattr(model, "is_quantized", False):
        return 0.2  # Activations are rounded with a scale of the whole batch.
    device = device_of(model).type
    eps = coarsest_eps(model, device)
    if device == "cuda" and _uses_tf32(model):
        eps = max(eps, torch.finfo(torch.float16).eps)
    return max(1e-5, 8 * eps)


def _uses_tf32(model: nn.Module) -> bool:
    if torch.backends.cuda.matmul.allow_tf32:
        return True
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return torch.backends.cudnn.allow_tf32 and any(
        isinstance(module, convolutions) for module in model.modules()
    )


def tolerance_of(*tensors: Tensor) -> float:
    """The relative difference that rounding may make."""
    return max(1e-4, *(4 * torch.finfo(tensor.dtype).eps for tensor in tensors))


def _is_close(own: Tensor, value: Tensor, tolerance: float) -> bool:
    distance = float((value - own).detach().abs())
    return distance <= tolerance * float(own.detach().abs()) + 1e-4


def _weightings(counts: Tensor) -> Iterator[Tensor]:
    """How a batch's loss may weigh the losses of its examples, from their numbers of labels."""
    labeled = (counts > 0).to(counts)
    yield torch.full_like(labeled, 1 / len(counts))
    yield torch.ones_like(labeled)
    yield counts / counts.sum().clamp(min=1)
    yield labeled / labeled.sum().clamp(min=1)


def _gradient(own: Tensor, logits: Tensor) -> Tensor | None:
    """The projected gradient of the model's own loss; None if it is not of these logits."""
    if not (own.requires_grad and logits.requires_grad):
        return None
    (gradient,) = torch.autograd.grad(own, logits, allow_unused=True)
    return None if gradient is None else projected(gradient)


def _has_another_term(own: Tensor, logits: Tensor) -> bool:
    """Whether a loss depends on parameters in another way than through the logits."""
    if logits.grad_fn is None:
        return False
    found, seen, stack = False, set(), [own.grad_fn]
    through_logits = False
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node is logits.grad_fn:
            through_logits = True
            continue
        found |= hasattr(node, "variable")
        stack.extend(parent for parent, _ in node.next_functions)
    # A loss of a copy of the logits does not pass through those that are returned.
    return found and through_logits


def _rows_agree(
    likelihood: Likelihood, logits: Tensor, labels: Tensor, gradient: Tensor, weights: Tensor
) -> bool:
    """Whether each example's gradient by its logits is the weighted one of the likelihood."""
    tolerance = tolerance_of(gradient, logits)
    size = max(1, CHUNK_ENTRIES // max(1, logits[0].numel()))
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        leaf = logits[rows].detach().requires_grad_()
        with torch.enable_grad():
            loss = (likelihood.losses(leaf, labels[rows]) * weights[rows]).sum()
        (known,) = torch.autograd.grad(loss, leaf)
        known = projected(known)
        difference = (known - gradient[rows]).flatten(1).norm(dim=1)
        allowed = tolerance * known.flatten(1).norm(dim=1) + 1e-6 * weights[rows]
        if bool((difference > allowed).any()):
            return False
    return True


def _is_binary(labels: Any) -> bool:
    return isinstance(labels, Tensor) and bool(((labels == 0) | (labels == 1)).all())
