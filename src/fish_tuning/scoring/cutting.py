"""Whether a model computes the same without padding."""

import torch
from torch import Tensor

from fish_tuning.scoring.inputs.batches import Batch
from fish_tuning.scoring.inputs.forward import Forward
from fish_tuning.scoring.inputs.outputs import logits_of, loss_of
from fish_tuning.scoring.inputs.padding import shortest, without_padding
from fish_tuning.scoring.losses.recognition import rounding


class Padding:
    """Cuts the padding of batches, if the model ignores it.

    Args:
        forward: Calls the model.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._cuts: bool | None = None

    def cut(self, batch: Batch) -> Batch:
        """The batch without the columns that are padding in all examples, where that is right."""
        return without_padding(batch) if self.may_be_cut(batch) else batch

    @torch.no_grad()
    def may_be_cut(self, batch: Batch) -> bool:
        """Whether the model computes the same for an example without its padding.

        Not if it flattens or averages all positions, reads the last one, or attends in blocks. The
        example with the most padding shows it, once.
        """
        if self._cuts is None and (padded := shortest(batch)) is not None:
            config = getattr(self._forward.base, "config", None)
            self._cuts = getattr(config, "attention_type", None) != "block_sparse" and (
                self._is_same(padded, without_padding(padded))
            )
        return bool(self._cuts)

    def _is_same(self, padded: Batch, cut: Batch) -> bool:
        expected = self._forward(padded, with_labels=True)
        try:
            found = self._forward(cut, with_labels=True)
        except (IndexError, RuntimeError, ValueError):
            return False
        tolerance = rounding(self._forward.base)
        for of in (loss_of, logits_of):
            a, b = of(expected), of(found)
            if isinstance(a, Tensor) and isinstance(b, Tensor) and not bool(a.isnan().any()):
                if a.dim() == b.dim() == 3:  # Of tokens, those of the text.
                    a = a[:, : b.shape[1]]
                if a.shape != b.shape or not bool(
                    (a - b).abs().max() <= 10 * tolerance * a.abs().max() + 1e-6
                ):
                    return False
        return True
