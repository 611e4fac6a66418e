"""Cross-entropy of each token, with one tensor of the logits' size less than autograd's own."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ENTRIES = 2**21
"""Most logits that are converted to float32 and exponentiated at a time."""

FEWEST_CHUNKS = 4
"""Even small logits are divided, so that a chunk is small beside what is kept anyway."""


def token_losses(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """-log softmax(logits)[label] of each token, and 0 where the label is `ignored`.

    A large vocabulary makes the logits the largest tensor of a training step. Autograd would keep
    their log-softmax for the backward pass, and make a copy in float32 first if they are in half
    precision. Here nothing is kept but the logits themselves, the softmax is computed again in the
    backward pass, and both passes go through the labeled tokens a few at a time.

    Args:
        logits: The logits, (n, C).
        labels: The classes, integers (n,).
        ignored: The label of tokens without a loss.

    Returns:
        The losses, (n,), in float32, or in float64 for such logits.
    """
    apply: Any = _TokenLosses.apply  # untyped
    losses: Tensor = apply(logits, labels, labeled_chunks(labels, logits.shape[1], ignored))
    return losses


def labeled_chunks(labels: Tensor, classes: int, ignored: int) -> tuple[Tensor, ...]:
    """The positions of the labeled tokens, as many at a time as are computed together."""
    labeled = (labels != ignored).nonzero().squeeze(1)
    most = min(CHUNK_ENTRIES // classes, len(labeled) // FEWEST_CHUNKS)
    chunks: tuple[Tensor, ...] = labeled.split(max(1, most))
    return chunks


def precise(logits: Tensor) -> Tensor:
    """The logits in float32, or in float64 if that is what they are in."""
    return logits if logits.dtype == torch.float64 else logits.float()


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, chunks: Sequence[Tensor]) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.chunks = chunks
        losses = torch.zeros_like(labels, dtype=precise(logits[:0]).dtype)
        for rows in chunks:
            losses[rows] = F.cross_entropy(precise(logits[rows]), labels[rows], reduction="none")
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of -log softmax(z)[y] by z: softmax(z) - onehot(y)."""
        logits, labels = ctx.saved_tensors
        result = torch.zeros_like(logits)
        for rows in ctx.chunks:
            of_loss = gradients[0][rows].unsqueeze(1)
            of_logits = F.softmax(precise(logits[rows]), -1).mul_(of_loss)
            of_logits.scatter_add_(1, labels[rows].unsqueeze(1), -of_loss)
            result[rows] = of_logits.to(result.dtype)
        return result, None, None
