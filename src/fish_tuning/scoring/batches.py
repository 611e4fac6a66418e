"""Batches of any loader, and calling a model with them."""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peft import PeftMixedModel
from torch import Tensor, nn

from fish_tuning.engines import device_of

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any] | Sequence[Any]
"""A mapping of forward arguments and labels, or a sequence of the input and the labels."""

LABELS = "labels"

IGNORED = -100
"""The label of tokens that are not part of the likelihood."""


def batch_size(batch: Batch) -> int:
    """The number of examples: the length of the labels, or else of the first tensor.

    Raises:
        ValueError: The batch has no tensor.
    """
    values = [*batch.values()] if isinstance(batch, Mapping) else [*batch]
    if isinstance(batch, Mapping) and isinstance(batch.get(LABELS), Tensor):
        values.insert(0, batch[LABELS])
    for value in values:
        if isinstance(value, Tensor) and value.dim() > 0:
            return len(value)
    names = f"keys {', '.join(batch)}" if isinstance(batch, Mapping) else f"{len(batch)} items"
    raise ValueError(f"no tensor in a calibration batch: {names}")


def take(batch: Batch, rows: slice | Sequence[int]) -> Batch:
    """The examples in these rows; values without one entry per example stay as they are."""
    size = batch_size(batch)

    def part(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > 0 and len(value) == size:
            return value[rows]
        if isinstance(value, list | tuple) and len(value) == size:
            return value[rows] if isinstance(rows, slice) else [value[row] for row in rows]
        return value

    if isinstance(batch, Mapping):
        return {key: part(value) for key, value in batch.items()}
    return [part(value) for value in batch]


def parts_by_length(
    batch: Batch, numbers: Sequence[int], size: int
) -> Iterator[tuple[Batch, Sequence[int]]]:
    """Divides a padded batch into parts of similar length, most of which need less padding.

    A batch whose padding cannot be cut (see `without_padding`) stays in one part.

    Args:
        batch: The batch.
        numbers: The number of each example in the calibration set.
        size: The most examples in a part.

    Yields:
        Each part, and the numbers of its examples.
    """
    lengths = _lengths(batch)
    if lengths is None:
        yield batch, numbers
        return
    rows = sorted(range(len(numbers)), key=lengths.__getitem__)
    for start in range(0, len(rows), size):
        of_part = rows[start : start + size]
        yield take(batch, of_part), [numbers[row] for row in of_part]


def without_padding(batch: Batch) -> Batch:
    """The batch without the columns that are padding in all examples.

    Only padding on the right is cut, and only if every entry with one value per token is known to
    be ignored there.
    """
    lengths = _lengths(batch)
    if lengths is None:
        return batch
    assert isinstance(batch, Mapping)
    shape = batch["attention_mask"].shape
    return {
        key: value[:, : max(lengths)] if _is_per_token(value, shape) else value
        for key, value in batch.items()
    }


# Entries with one value per token. An unknown key may have as many columns by chance, or values
# that matter where the attention mask is 0.
_BY_TOKEN = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}


def _lengths(batch: Batch) -> list[int] | None:
    """The number of tokens of each example; None if the batch has no padding that can be cut."""
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    if not all(
        isinstance(value, Tensor) and value.shape[:1] == mask.shape[:1] for value in batch.values()
    ):
        return None
    per_token = {key for key, value in batch.items() if _is_per_token(value, mask.shape)}
    if not per_token <= _BY_TOKEN | {LABELS}:
        return None
    real = mask != 0
    padded_elsewhere = real[:, 1:] & ~real[:, :-1]
    if bool(padded_elsewhere.any()):
        return None
    if LABELS in per_token and bool(((batch[LABELS] != IGNORED) & ~real).any()):
        return None
    lengths: list[int] = real.sum(1).tolist()
    return lengths if 0 < min(lengths) < mask.shape[1] else None


def _is_per_token(value: Any, shape: Sequence[int]) -> bool:
    """Whether a value has an entry for each token of a mask of this shape."""
    return isinstance(value, Tensor) and value.shape[:2] == shape


def _base_of(model: Any) -> Any:
    """The model inside PEFT's wrappers."""
    if isinstance(model, PeftMixedModel):
        return model.base_model.model
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


class Forward:
    """Calls a model with those entries of a batch that its forward takes.

    Args:
        model: A transformers or PEFT model, or any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.base: Any = _base_of(model)
        parameters = inspect.signature(self.base.forward).parameters
        self._named = {
            name
            for name, parameter in parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        }
        self._takes_any = not self._named
        # An argument of PEFT's wrapper, which does not pass it on to the base model.
        self._named |= {"task_ids"} & inspect.signature(model.forward).parameters.keys()
        self._labels_required = (
            LABELS in parameters and parameters[LABELS].default is inspect.Parameter.empty
        )
        self._dropped: set[str] = set()

    def on_device(self, batch: Batch | Tensor) -> Batch:
        """The batch with its tensors on the model's device."""
        device = device_of(self.model)
        if isinstance(batch, Tensor):
            batch = [batch]

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        if isinstance(batch, Mapping):
            return {key: move(value) for key, value in batch.items()}
        return [move(value) for value in batch]

    def __call__(self, batch: Batch, *, with_labels: bool) -> Any:
        """The model's outputs, with its own loss only if `with_labels`."""
        if not isinstance(batch, Mapping):
            return self.model(batch[0])
        arguments = {k: v for k, v in batch.items() if self._takes_any or k in self._named}
        self._report_dropped(batch.keys() - arguments.keys() - {LABELS})
        if not with_labels and not self._labels_required and LABELS in arguments:
            # The model would compute a loss over the whole vocabulary that nobody reads.
            self._remove_labels(arguments)
        if "use_cache" in self._named:
            arguments.setdefault("use_cache", False)
        if _padded_left(arguments) and self._counts_positions_from_mask():
            mask = arguments["attention_mask"]
            arguments.setdefault("position_ids", (mask.cumsum(-1) - 1).clamp(min=0))
        return self.model(**arguments)

    def _remove_labels(self, arguments: dict[str, Any]) -> None:
        encoder_decoder = getattr(getattr(self.base, "config", None), "is_encoder_decoder", False)
        if not encoder_decoder or "decoder_input_ids" in arguments:
            del arguments[LABELS]
        elif hasattr(self.base, "prepare_decoder_input_ids_from_labels"):
            labels = arguments.pop(LABELS)
            arguments["decoder_input_ids"] = self.base.prepare_decoder_input_ids_from_labels(
                labels=labels
            )

    def _counts_positions_from_mask(self) -> bool:
        """Whether `generate` gives this model position ids that skip padding on the left."""
        generates = getattr(self.base, "can_generate", bool)()
        return (
            generates and "position_ids" in self._named and not self.base.config.is_encoder_decoder
        )

    def _report_dropped(self, keys: set[str]) -> None:
        if new := sorted(keys - self._dropped):
            self._dropped |= keys
            logger.warning(
                "Dropped from the calibration batches, as %s.forward does not take them: %s",
                type(self.base).__name__,
                ", ".join(new),
            )


def _padded_left(arguments: Mapping[str, Any]) -> bool:
    mask = arguments.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return False
    return bool((mask[:, 0] == 0).any())
