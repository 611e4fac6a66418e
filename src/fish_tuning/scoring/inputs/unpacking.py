"""Rows that hold several examples -> a padded batch with one example a row.

The scores of the padded batch are those of its examples, so nothing else needs to know about rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fish_tuning.scoring.inputs.batches import IGNORED, LABELS, Batch
from fish_tuning.scoring.inputs.forward import Forward
from fish_tuning.scoring.inputs.precision import coarsest_eps
from fish_tuning.scoring.inputs.segments import (
    BORDERS,
    MASK,
    POSITIONS,
    WAY_OUT,
    Segment,
    find_segments,
    shape_of_text,
)


class Unpacker:
    """Gives every example of a batch a row of its own.

    The examples of a row are scored as if each were alone, which is right only if they are
    independent in the model. transformers' models separate them by `position_ids`, but not under
    every attention and not if there is an attention mask. So the model is run: its outputs for some
    examples have to be the same within their row and alone. This is done once for every kind of
    batch.

    Args:
        forward: Calls the model.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._independent: set[object] = set()
        config: Any = getattr(forward.base, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        pad_id = getattr(text, "pad_token_id", None)
        self._pad_id = pad_id if isinstance(pad_id, int) else None

    def __call__(self, batch: Batch) -> tuple[Batch, int | None]:
        """The batch with one example a row, and the number of tokens it had if it was packed.

        Raises:
            ValueError: The rows cannot be divided into independent examples.
        """
        segments = find_segments(batch, self._pad_id)
        if not segments:
            return batch, None
        assert isinstance(batch, Mapping)
        examples = self._padded(batch, segments)
        kind = _kind_of(batch, segments)
        if kind is None or kind not in self._independent:
            self._check_independence(batch, segments)
            self._independent.add(kind)
        rows, width = _shape(batch)
        return examples, rows * width

    def _padded(self, batch: Mapping[str, Any], segments: Sequence[Segment]) -> dict[str, Any]:
        """The segments as the rows of a batch, padded on the right."""
        shape = _shape(batch)
        padded = {}
        for key, value in batch.items():
            if key in BORDERS or key == MASK:
                continue
            if key == POSITIONS and len(value) == 1:
                value = value.expand(shape)
            if isinstance(value, Tensor) and value.shape[:2] == shape:
                padded[key] = _cut(value, segments, self._fill(key, value))
            elif self._forward.takes(key) and not _is_setting(value):
                raise ValueError(
                    f"the rows of the batch hold {len(segments)} examples, and {key!r} has no "
                    f"entry for each token, so it cannot be divided among them: {WAY_OUT}"
                )
            else:
                padded[key] = value
        if self._forward.takes(MASK):
            mask = batch.get(MASK)
            if not isinstance(mask, Tensor) or mask.shape != shape:
                mask = torch.ones(shape)
            padded[MASK] = _cut((mask != 0).long(), segments, 0)
        return padded

    def _fill(self, key: str, value: Tensor) -> int | None:
        if key == POSITIONS:
            return None  # Positions beyond an example's own may not exist.
        read_by_model = self._forward.takes(key) and key != LABELS
        # What a loss_fn reads is padded like labels, so that padding is ignored or an error.
        return 0 if read_by_model or value.is_floating_point() else IGNORED

    @torch.no_grad()
    def _check_independence(self, batch: Mapping[str, Any], segments: Sequence[Segment]) -> None:
        """Compares the outputs of some examples within their row and alone.

        The last example of a row is the one that has most before it, the first the one that has
        most after it.
        """
        longer = [segment for segment in segments if segment.stop > segment.start + 1] or segments
        rows = {segment.row: segment for segment in longer}  # the last of each row
        first_row, last_row = min(rows), max(rows)
        shortest = min(longer, key=lambda segment: segment.stop - segment.start)
        some = [*dict.fromkeys([longer[0], rows[first_row], rows[last_row], shortest])]
        together, alone = self._outputs(batch), self._outputs(self._padded(batch, some))
        eps = self._eps(alone)
        for segment, single in zip(some, alone, strict=True):
            row, start, stop = segment
            difference = _difference(together[row, start:stop], single[: stop - start], eps)
            if not difference <= max(1e-3, 8 * eps):
                raise ValueError(self._dependent(batch))

    def _outputs(self, batch: Mapping[str, Any]) -> Tensor:
        """The model's outputs for each token, (rows, tokens, ...)."""
        outputs = self._forward(self._forward.on_device(batch), with_labels=False)
        width = _shape(batch)[1]
        fields = [getattr(outputs, name, None) for name in ("logits", "last_hidden_state")]
        for found in [outputs, *fields]:
            if isinstance(found, Tensor) and found.dim() == 3 and found.shape[1] >= width:
                return found[:, found.shape[1] - width :]  # A prompt may come before the tokens.
        raise ValueError(
            f"rows hold several examples, but {self._name} has no output for each token that could "
            f"show whether they are independent: {WAY_OUT}"
        )

    def _eps(self, outputs: Tensor) -> float:
        """The relative rounding error of the coarsest type that the model computes in."""
        device = outputs.device.type
        eps = coarsest_eps(self._forward.model, device, outputs.dtype)
        tensor_float = device == "cuda" and torch.get_float32_matmul_precision() != "highest"
        return max(eps, 2**-10) if tensor_float else eps

    def _dependent(self, batch: Mapping[str, Any]) -> str:
        way_out = WAY_OUT
        if MASK in batch:
            way_out = (
                f"give {POSITIONS} that start again with each example in place of {MASK}, or "
                f"{way_out}"
            )
        return (
            f"the outputs of {self._name} for an example change with the other examples of its "
            f"row, so the example has no score of its own: {way_out}"
        )

    @property
    def _name(self) -> str:
        return type(self._forward.base).__name__


def _difference(within: Tensor, alone: Tensor, eps: float) -> float:
    """The largest difference of a token's outputs (tokens, d), relative to their norm.

    In half precision it is the largest median over three tokens at either end, because a router may
    send a single token another way when sums are rounded differently. The ends count by themselves:
    with a window or a short convolution, they alone see the other examples.
    """
    alone = alone.float()
    norms = alone.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    by_token = (within.float() - alone).norm(dim=1) / norms
    if eps < 1e-4:
        return float(by_token.max())
    return max(float(end.median()) for end in (by_token[:3], by_token[-3:]))


def _cut(value: Tensor, segments: Sequence[Segment], fill: int | None) -> Tensor:
    """The segments of an entry with one value per token, padded to the longest.

    Args:
        value: The entry, (rows, tokens, ...).
        segments: The segments.
        fill: The value of padding; the segment's last value if None.
    """
    parts = [value[row, start:stop] for row, start, stop in segments]
    padded = nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill or 0)
    if fill is None:
        for row, part in zip(padded, parts, strict=True):
            row[len(part) :] = part[-1]
    return padded


def _shape(batch: Mapping[str, Any]) -> tuple[int, int]:
    shape = shape_of_text(batch)
    assert shape is not None
    return shape


def _is_setting(value: Any) -> bool:
    """Whether a value holds for the whole batch, and not for single rows."""
    scalar = isinstance(value, Tensor) and value.dim() == 0
    return value is None or scalar or isinstance(value, bool | int | float | str)


def _kind_of(batch: Mapping[str, Any], segments: Sequence[Segment]) -> object:
    """What may change how a model treats the rows of a batch; None if each batch may differ."""
    mask = batch.get(MASK)
    if isinstance(mask, Tensor) and mask.dim() != 2:
        return None
    rows = {segment.row for segment in segments}
    padded = isinstance(mask, Tensor) and not bool(mask.all())
    return frozenset(batch), _shape(batch)[0] > 1, len(segments) > len(rows), padded
