"""A learning rate to start from: how far above that of the dense adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fish_tuning.names import side_of

_EXPONENT = -0.6
_LOW = 1.6e-4
"""A tenth of what the best rates of the study, divided by the factor, have in common."""


def rate_factor(mask: Mapping[str, Tensor]) -> float:
    """Return how many times the dense adapter's learning rate suits the entries that are selected.

    Adam moves every entry by about the learning rate, so few entries have to move further. The
    factor is density ** -0.6, a fit to the best rates that were found for LoRA of rank 8 and for
    FISH in docs/study/README.md: 1.0 to 1.8 times LoRA's at a density of 0.5, 1.7 to 5 at 0.125,
    5 to 27 at 0.02. It is a start for a search, not a prediction.

    Args:
        mask: A mask of LoRA matrices. Other tensors and those that are selected completely, such
            as the head, do not count.
    """
    parts = [bits for name, bits in mask.items() if side_of(name) and not bits.all()]
    selected = sum(int(bits.sum()) for bits in parts)
    return (selected / sum(bits.numel() for bits in parts)) ** _EXPONENT if selected else 1.0


def advice_on_rate(mask: Mapping[str, Tensor], optimizer: Any) -> str | None:
    """Return advice for an optimizer whose learning rate looks like that of a dense adapter.

    Args:
        mask: What is trained.
        optimizer: A torch optimizer; only Adam and its kin are known well enough.

    Returns:
        One sentence, or None if the rate is high enough, or dense enough a mask to share LoRA's.
    """
    factor = rate_factor(mask)
    kind = type(getattr(optimizer, "optimizer", optimizer)).__name__  # inside accelerate's wrapper
    # A scheduler has set the rate to that of its first step, and kept the configured one.
    rate = max(group.get("initial_lr", group["lr"]) for group in optimizer.param_groups)
    if factor < 2 or rate >= _LOW * factor or "adam" not in kind.lower():
        return None
    return (
        f"The learning rate {float(rate):g} may be too low: the mask selects "
        f"{factor ** (1 / _EXPONENT):.1%} of LoRA's entries, and so few need a higher rate than "
        f"all of them do. Start with about {factor:.2g} times the rate that suits dense LoRA "
        "(docs/guide/training.md)."
    )
