"""What a model is called with: batches of any loader, and the arguments its forward takes."""

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any] | Sequence[Any]
"""A mapping of forward arguments and labels, or a sequence whose first item is the input."""

LABELS = "labels"


def batch_size(batch: Batch) -> int:
    """The number of examples, by the labels or else the first tensor.

    Raises:
        ValueError: There is no tensor in the batch.
    """
    values = [*batch.values()] if isinstance(batch, Mapping) else [*batch]
    if isinstance(batch, Mapping) and isinstance(batch.get(LABELS), Tensor):
        values.insert(0, batch[LABELS])
    for value in values:
        if isinstance(value, Tensor) and value.dim() > 0:
            return len(value)
    raise ValueError(f"no tensor in a calibration batch: {_describe(batch)}")


def take(batch: Batch, start: int, stop: int) -> Batch:
    """The examples from start to stop of everything that has one entry an example."""
    size = batch_size(batch)

    def part(value: Any) -> Any:
        by_example = isinstance(value, list | tuple) or (
            isinstance(value, Tensor) and value.dim() > 0
        )
        return value[start:stop] if by_example and len(value) == size else value

    if isinstance(batch, Mapping):
        return {key: part(value) for key, value in batch.items()}
    return [part(value) for value in batch]


def _describe(batch: Batch) -> str:
    return f"keys {', '.join(batch)}" if isinstance(batch, Mapping) else f"{len(batch)} items"


class Forward:
    """Calls a model with what its forward takes of a batch.

    Args:
        model: A transformers or PEFT model, or any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        get_base_model: Any = getattr(model, "get_base_model", None)
        self.base: Any = model if get_base_model is None else get_base_model()
        parameters = inspect.signature(self.base.forward).parameters
        self._named = {
            name
            for name, parameter in parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        }
        self._takes_any = not self._named
        self._labels_required = (
            LABELS in parameters and parameters[LABELS].default is inspect.Parameter.empty
        )
        self._dropped: set[str] = set()

    def on_device(self, batch: Batch | Tensor) -> Batch:
        """The batch with its tensors on the model's device."""
        device = next(self.model.parameters()).device
        if isinstance(batch, Tensor):
            batch = [batch]

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        if isinstance(batch, Mapping):
            return {key: move(value) for key, value in batch.items()}
        return [move(value) for value in batch]

    def __call__(self, batch: Batch, *, with_labels: bool) -> Any:
        """The model's outputs, with its own loss only where `with_labels`."""
        if not isinstance(batch, Mapping):
            return self.model(batch[0])
        arguments = {k: v for k, v in batch.items() if self._takes_any or k in self._named}
        self._report_dropped(batch.keys() - arguments.keys() - {LABELS})
        if not with_labels and not self._labels_required and LABELS in arguments:
            # The model would compute a loss that nobody reads, over all the vocabulary.
            self._leave_labels_out(arguments)
        if "use_cache" in self._named:
            arguments.setdefault("use_cache", False)
        if _padded_left(arguments) and self._counts_positions_from_mask():
            mask = arguments["attention_mask"]
            arguments.setdefault("position_ids", (mask.cumsum(-1) - 1).clamp(min=0))
        return self.model(**arguments)

    def _leave_labels_out(self, arguments: dict[str, Any]) -> None:
        encoder_decoder = getattr(getattr(self.base, "config", None), "is_encoder_decoder", False)
        if not encoder_decoder or "decoder_input_ids" in arguments:
            del arguments[LABELS]
        elif hasattr(self.base, "prepare_decoder_input_ids_from_labels"):
            labels = arguments.pop(LABELS)
            arguments["decoder_input_ids"] = self.base.prepare_decoder_input_ids_from_labels(
                labels=labels
            )

    def _counts_positions_from_mask(self) -> bool:
        """Whether generate() gives this model position ids that skip padding on the left."""
        generates = getattr(self.base, "can_generate", bool)()
        return (
            generates
            and "position_ids" in self._named
            and (not self.base.config.is_encoder_decoder)
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
