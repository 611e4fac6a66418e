"""What leaves a masked model for folders and hubs takes the mask and its description along."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from fish_tuning.mask.card import write_card
from fish_tuning.sparse.holder import holder_of

_CARD = "create_model_card"
"""What every Trainer writes its card with, over the one that the model has saved."""


def accompany(model: nn.Module) -> None:
    """Lets what a masked model and its Trainers save and push have the mask with it."""
    for name, with_mask in _SAVING.items():
        if hasattr(model, name):
            # A partial, unlike a bound method of another class's making, can be pickled.
            vars(model)[name] = functools.partial(with_mask, model)
    describe_in_trainers_cards()


def leave_alone(model: nn.Module) -> None:
    """Takes back what `accompany` has set on the model."""
    for name in _SAVING:
        vars(model).pop(name, None)


def write_mask(model: nn.Module, folder: str) -> None:
    """Writes a masked model's mask into a folder, and what it is into the folder's card."""
    holder = holder_of(model)
    if holder is not None:
        mask = holder.mask()
        mask.save_pretrained(folder)
        write_card(folder, mask, is_adapter=isinstance(model, PeftModel))


def saves_itself(model: nn.Module) -> bool:
    """Whether a Trainer calls the model's own save_pretrained; of others it writes the weights."""
    return isinstance(model, PreTrainedModel | PeftModel)


def describe_in_trainers_cards() -> None:
    """Has all Trainers there are, TRL's too, say in their cards what is masked in their models.

    A Trainer asks neither its callbacks nor the model once its card is written, and uploads it at
    once. So the method itself is wrapped, in each class that has one of its own; the card of a
    model without a mask stays what it is.
    """
    trainers = sys.modules.get("transformers.trainer")
    kinds = [] if trainers is None else [trainers.Trainer]
    for kind in kinds:
        kinds += kind.__subclasses__()
        own = vars(kind).get(_CARD)
        if own is not None and not hasattr(own, "describes_mask"):
            setattr(kind, _CARD, _describing(own))


def _describing(create_model_card: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(create_model_card)
    def described(self: Any, *args: Any, **kwargs: Any) -> None:
        create_model_card(self, *args, **kwargs)
        if self.is_world_process_zero():
            write_mask(self.model, str(self.args.output_dir))

    described.describes_mask = True  # type: ignore[attr-defined]
    return described


def _save_pretrained(self: Any, save_directory: str, *args: Any, **kwargs: Any) -> Any:
    """The model's own save_pretrained, with the mask and its description beside what it writes."""
    result = type(self).save_pretrained(self, save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True):
        write_mask(self, save_directory)
    # Of Trainers imported since, too: one that pushes saves the model first.
    describe_in_trainers_cards()
    return result


def _upload_modified_files(self: Any, working_dir: str, *args: Any, **kwargs: Any) -> Any:
    """The model's own upload, of a folder whose card push_to_hub has just replaced."""
    write_mask(self, working_dir)
    return type(self)._upload_modified_files(self, working_dir, *args, **kwargs)


def _save_adapter(self: Any, save_directory: str, *args: Any, **kwargs: Any) -> Any:
    """save_adapter of the adapters library, which its save_all_adapters calls for each folder."""
    result = type(self).save_adapter(self, save_directory, *args, **kwargs)
    write_mask(self, save_directory)
    return result


_SAVING = {
    "save_pretrained": _save_pretrained,
    # What every push_to_hub of transformers and PEFT calls with the folder that it has written.
    "_upload_modified_files": _upload_modified_files,
    "save_adapter": _save_adapter,
}
"""Methods of models that write a folder, each with the one that writes the mask there too."""
