"""Calling a model with a batch."""

import inspect
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args, is_typeddict

import torch
from peft import PeftMixedModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from fish_tuning.engines import device_of
from fish_tuning.scoring.inputs.batches import LABELS, Batch, described, with_tensors
from fish_tuning.scoring.inputs.origin import is_of_transformers
from fish_tuning.scoring.inputs.outputs import logits_of
from fish_tuning.scoring.inputs.positions import (
    LeftPadding,
    is_padded_left,
    left_padding,
    positions_from_mask,
    reads_padding,
)
from fish_tuning.scoring.inputs.reading import read_batch
from fish_tuning.sharded_model import ShardedModel

logger = logging.getLogger(__name__)

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Forward:
    """Calls a model with those entries of a batch that its forward takes.

    Args:
        model: A transformers or PEFT model, or any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.base: Any = _base_of(model)
        self._sharded = ShardedModel(model)
        parameters = inspect.signature(self.base.forward).parameters
        self._named = [name for name, p in parameters.items() if p.kind in _NAMED]
        self._required = {
            name for name in self._named if parameters[name].default is inspect.Parameter.empty
        }
        self._takes_any, declared = _keywords(parameters.values())
        # An argument of PEFT's wrapper, which does not pass it on to the base model.
        own = {"task_ids"} & inspect.signature(model.forward).parameters.keys()
        self._taken = {*self._named, *declared, *own}
        self._refused: set[str] = set()
        self._dropped: set[str] = set()
        self._caches = "use_cache" in self._named or _passes_on(self.base, "use_cache")
        self._labels_needed = LABELS in self._required
        self._left_padding: LeftPadding | None = None
        self.has_own_loss = not is_of_transformers(model, self.base)
        """Whether the forward pass or the loss may be the caller's own, and not transformers'."""
        self.predicts_first_token = False
        """Whether the loss may have a term for the first token after padding on the left. Then a
        batch in which this token has a label is left exactly as it is given."""

    def takes(self, key: str) -> bool:
        """Whether the model's forward takes an argument of this name."""
        return (self._takes_any or key in self._taken) and key not in self._refused

    def read(self, value: Any, *, only_labels: bool = True) -> Batch:
        """What a loader yields as a batch.

        Args:
            value: What the loader yields.
            only_labels: As in `read_batch`.

        Raises:
            ValueError: It is not certain what the items of the batch mean.
        """
        batch = read_batch(value, self._named, self.takes(LABELS), only_labels=only_labels)
        if not only_labels and isinstance(batch, list | tuple) and len(batch) > 2:
            self._check_takes_one(batch)
        return batch

    def on_device(self, batch: Batch) -> Batch:
        """The batch with its tensors on the model's device."""
        device = device_of(self.model)
        moved: Batch = with_tensors(batch, lambda tensor: tensor.to(device))
        return moved

    def __call__(self, batch: Batch, *, with_labels: bool) -> Any:
        """The model's outputs, with its own loss only if `with_labels`.

        Raises:
            ValueError: The batch lacks an argument that the model needs.
        """
        if not isinstance(batch, Mapping):
            return self._passed(batch[0])
        arguments = self._arguments(batch)
        if not with_labels and not self._labels_needed and LABELS in arguments:
            # The model would compute a loss over the whole vocabulary that nobody reads.
            self._remove_labels(arguments)
        if self._skips_padding(batch, arguments):
            arguments["position_ids"] = positions_from_mask(arguments["attention_mask"])
        return self._call(arguments)

    def leave_labels_out_only_if_equal(self, batch: Batch, logits: Any) -> None:
        """Compares the logits without labels with those that a batch has with labels.

        A forward of the caller's own may need labels to compute what it returns. Afterwards labels
        are always passed if it does.
        """
        if self._labels_needed or type(self.base).forward.__module__.startswith("transformers."):
            return
        try:
            with torch.no_grad():
                found = logits_of(self(batch, with_labels=False))
            same = isinstance(found, Tensor) and found.shape == logits.shape
            self._labels_needed = not (same and torch.equal(found, logits))
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            self._labels_needed = True

    def _arguments(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The entries that the model takes, and no cache."""
        taken = {key: value for key, value in batch.items() if self.takes(key)}
        missing = self._required - taken.keys()
        if missing or not taken.keys() - {LABELS}:
            needs = ", ".join(sorted(missing)) or "an input"
            raise ValueError(
                f"{type(self.base).__name__}.forward needs {needs}, which the calibration batches "
                f"do not have ({described(batch)}): tokenize texts, and name the entries as the "
                "arguments of forward, or give pairs (input, labels)"
            )
        self._report_dropped(batch.keys() - taken.keys() - {LABELS})
        if self._caches:
            taken.setdefault("use_cache", False)
        return taken

    def _call(self, arguments: dict[str, Any]) -> Any:
        """Calls the model; keywords that something below its forward refuses are dropped."""
        while True:
            try:
                return self._passed(**arguments)
            except TypeError as error:
                # "got an unexpected keyword argument 'x'", or "multiple values for" it.
                found = re.search(r"keyword argument '(\w+)'", str(error))
                key = found[1] if found else ""
                if not self._takes_any or key in self._named or key not in arguments:
                    raise
            self._refused.add(key)
            self._report_dropped({key})
            del arguments[key]

    def _passed(self, *args: Any, **kwargs: Any) -> Any:
        # The last pass may have been interrupted, or never have had its backward pass.
        self._sharded.settle()
        return self.model(*args, **kwargs)

    def _check_takes_one(self, items: Sequence[Any]) -> None:
        if self._takes_any or len(self._named) != 1:
            raise ValueError(
                f"a calibration batch has {len(items)} items without names, and "
                f"{type(self.base).__name__}.forward takes more than one: give mappings, "
                "{'input_ids': ..., 'attention_mask': ..., 'labels': ...}"
            )

    def _remove_labels(self, arguments: dict[str, Any]) -> None:
        encoder_decoder = getattr(getattr(self.base, "config", None), "is_encoder_decoder", False)
        if not encoder_decoder or "decoder_input_ids" in arguments:
            del arguments[LABELS]
        elif hasattr(self.base, "prepare_decoder_input_ids_from_labels"):
            labels = arguments.pop(LABELS)
            arguments["decoder_input_ids"] = self.base.prepare_decoder_input_ids_from_labels(
                labels=labels
            )

    def ignores_left_padding(self, batch: Batch) -> bool:
        """Whether a call gives examples the outputs that they have without padding on the left."""
        if not isinstance(batch, Mapping) or not self._may_ignore(batch):
            return False
        if self._left_padding is None:
            self._left_padding = left_padding(
                self._logits, batch, may_skip="position_ids" not in batch and self._may_skip()
            )
        return self._left_padding is not LeftPadding.COUNTED

    def _may_ignore(self, batch: Mapping[str, Any]) -> bool:
        """Whether an example is padded on the left, and the loss does not read this padding."""
        mask = batch.get("attention_mask")
        if not isinstance(mask, Tensor) or not is_padded_left(mask):
            return False
        labels = batch.get(LABELS)
        return not reads_padding(mask, labels, first_token=self.predicts_first_token)

    def _skips_padding(self, batch: Mapping[str, Any], arguments: Mapping[str, Any]) -> bool:
        """Whether to pass position ids that skip padding on the left, as `generate` does."""
        return (
            "position_ids" not in arguments
            and is_padded_left(arguments.get("attention_mask"))
            and self._may_skip()
            and self.ignores_left_padding(batch)
            and self._left_padding is LeftPadding.SKIPPED
        )

    def _may_skip(self) -> bool:
        """Whether position ids may be passed: to what generates text, also inside a wrapper."""
        if hasattr(self.base, "can_generate"):
            takes = "position_ids" in self._named
            models = [self.base]
        else:
            takes = self.takes("position_ids")
            models = [m for m in self.base.modules() if isinstance(m, PreTrainedModel)]
        return (
            takes
            and any(model.can_generate() for model in models)
            and not any(model.config.is_encoder_decoder for model in models)
        )

    def _logits(self, batch: Mapping[str, Any]) -> Any:
        arguments = self._arguments(batch)
        arguments.pop(LABELS, None)
        return logits_of(self._call(arguments))

    def _report_dropped(self, keys: set[str]) -> None:
        if new := sorted(keys - self._dropped):
            self._dropped |= keys
            logger.warning(
                "Dropped from the calibration batches, as %s.forward does not take them: %s",
                type(self.base).__name__,
                ", ".join(new),
            )


def _base_of(model: Any) -> Any:
    """The model inside PEFT's wrappers."""
    if isinstance(model, PeftMixedModel):
        return model.base_model.model
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def _passes_on(model: Any, key: str) -> bool:
    """Whether a transformers model passes this keyword on to the model without its head."""
    inner = getattr(model, "base_model", model)
    if not isinstance(model, PreTrainedModel) or inner is model:
        return False
    own, below = (inspect.signature(part.forward).parameters for part in (model, inner))
    return key in below and any(p.kind is p.VAR_KEYWORD for p in own.values())


def _keywords(parameters: Iterable[inspect.Parameter]) -> tuple[bool, set[str]]:
    """Whether a forward takes any keyword, or else the keywords that its **kwargs declares."""
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            for declared in get_args(parameter.annotation):  # **kwargs: Unpack[SomeTypedDict]
                if is_typeddict(declared):
                    return False, set(declared.__annotations__)
            return True, set()
    return False, set()
