"""Scores other than Fisher information: random numbers, weight magnitudes, reversed scores."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fish_tuning.arguments import check_integer, check_scores, check_type


def random_scores(like: Mapping[str, Tensor | Sequence[int]], seed: int) -> dict[str, Tensor]:
    """Uniform scores in [0, 1): selecting by them selects at random.

    The scores of a tensor depend only on the seed, its name and its shape, not on other tensors.

    Args:
        like: Parameter name to a tensor of the wanted shape, or to the shape itself.
        seed: The random seed.

    Returns:
        Parameter name to float64 scores on the CPU. In float32, a large pool would have many ties.

    Examples:
        >>> mask = create_mask_from_fisher(random_scores(scores, seed=0), keep_ratio=0.5)
    """
    check_scores("like", like)
    check_integer("seed", seed)
    scores = {}
    for name, shape in like.items():
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        size = tuple(shape.shape if isinstance(shape, Tensor) else shape)
        scores[name] = torch.rand(size, generator=generator, dtype=torch.float64)
    return scores


def reversed_scores(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scores negated: selecting by them selects the least important entries.

    Args:
        scores: Parameter name to scores.

    Returns:
        Parameter name to negated scores with the same shape, dtype and device.

    Examples:
        >>> mask = create_mask_from_fisher(reversed_scores(scores), keep_ratio=0.5)
    """
    check_scores("scores", scores)
    return {name: -tensor for name, tensor in scores.items()}


def magnitude_scores(model_or_params: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The absolute value of every weight: selecting by it selects the largest weights.

    Args:
        model_or_params: A model, whose trainable parameters are scored, or a mapping from names
            to weights, all of which are scored.

    Returns:
        Parameter name to detached scores with the same shape, dtype and device as the weights.

    Examples:
        >>> mask = create_mask_from_fisher(magnitude_scores(model), keep_ratio=0.5)
    """
    if isinstance(model_or_params, nn.Module):
        model_or_params = {n: p for n, p in model_or_params.named_parameters() if p.requires_grad}
    check_type("model_or_params", model_or_params, Mapping, "a model, or its weights by name")
    return {name: tensor.detach().abs() for name, tensor in model_or_params.items()}
