"""Calling a model with a batch."""

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from peft import PeftMixedModel
from torch import Tensor, nn

from fish_tuning.engines import device_of
from fish_tuning.scoring.batches import LABELS, Batch, OneExample

logger = logging.getLogger(__name__)


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

    def takes(self, key: str) -> bool:
        """Whether the model's forward takes an argument of this name."""
        return self._takes_any or key in self._named

    def on_device(self, batch: Batch | Tensor) -> Batch:
        """The batch with its tensors on the model's device."""
        device = device_of(self.model)
        if isinstance(batch, OneExample):
            return batch  # Its loss moves what it needs.
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
