"""Tolerances of float32 comparisons, measured instead of guessed.

Two correct ways to compute the same number in float32 differ by rounding, and by how much depends
on the processor's instructions and on how well conditioned the number is. A change of every weight
by one unit in its last place does to the result what rounding does, so the reference's own answer
to such a change says how far apart two correct results may lie.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

MARGIN = 4
"""Tolerance over the measured change. On three instruction sets, 1.2 was the largest needed."""


@contextmanager
def nudged(model: nn.Module, seed: int) -> Iterator[None]:
    """Move every float32 entry of the model to the next number above or below, at random."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [t for t in [*model.parameters(), *model.buffers()] if t.dtype == torch.float32]
    before = [tensor.detach().clone() for tensor in tensors]
    with torch.no_grad():
        for tensor in tensors:
            up = torch.rand(tensor.shape, generator=generator) < 0.5
            tensor.copy_(torch.nextafter(tensor, torch.where(up, torch.inf, -torch.inf)))
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


def float32_rtol(
    model: nn.Module, scores: Callable[[], dict[str, Tensor]], expected: dict[str, Tensor]
) -> float:
    """Return the relative tolerance of float32 scores, for `assert_scores_close`.

    Args:
        model: Changed while the scores are computed again, and then restored.
        scores: Computes the reference scores of the model as it is.
        expected: What `scores` returned for the unchanged model.
    """
    with nudged(model, seed=0):
        moved = scores()
    largest = max(float(score.max()) for score in expected.values())
    changes = [0.0]
    for name, score in expected.items():
        size = largest if zero_in_theory(name) else float(score.square().mean().sqrt())
        if size:
            changes.append(float((moved[name] - score).abs().max()) / size)
    return MARGIN * max(changes)


def zero_in_theory(name: str) -> bool:
    """Whether the gradient is 0 except for rounding: softmax ignores an attention key's bias."""
    return name.endswith(("key.bias", "k_proj.bias", "key_proj.bias", "key.base_layer.bias"))
