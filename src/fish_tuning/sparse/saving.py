"""What is saved of a masked model, or pushed to a hub, takes the mask and its description along."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from fish_tuning.engines import is_in_zero_3, is_sharded
from fish_tuning.mask.card import write_card
from fish_tuning.mask.checkpoint import mask_folders, mask_of_checkpoint
from fish_tuning.mask.files import JSON_FILE
from fish_tuning.mask.mask import FishMask
from fish_tuning.parts import whole
from fish_tuning.sparse.adapter_names import belongs_to_adapter
from fish_tuning.sparse.patches import original, patch
from fish_tuning.sparse.registry import state_of
from fish_tuning.sparse.state import MaskState
from fish_tuning.sparse.state_dict import with_tensors

_WEIGHTS = re.compile(r"(adapter_model|pytorch_adapter|model|pytorch_model)\b.*\.(safetensors|bin)")
"""Names of files with weights that save_pretrained, Trainers and the adapters library write."""


def patch_saving(state: MaskState, root: nn.Module) -> None:
    """Have what a masked model and its Trainers save and push take the mask along."""
    patch(state, root, "save_pretrained", _save_pretrained)
    # What every push_to_hub of transformers and PEFT calls with the folder that it has written.
    patch(state, root, "_upload_modified_files", _upload_modified_files)
    # Of the adapters library, whose save_all_adapters calls it for each folder.
    patch(state, root, "save_adapter", _save_adapter)
    if isinstance(root, PeftModel):
        patch(state, root, "load_adapter", _load_adapter)
    patch_trainers()


def write_mask(model: nn.Module, folder: str, adapters: Iterable[str] | None = None) -> None:
    """Write a masked model's mask beside its weights, and what it is into the folder's card.

    PEFT saves an adapter called "default" into the folder itself, others into folders of their
    names: each gets the part of the mask that belongs to it.

    Args:
        model: The model. Without a mask, nothing is written.
        folder: Where the model was saved.
        adapters: The adapters that were saved, or None for all.
    """
    state = state_of(model)
    mask = None if state is None else state.mask()
    if state is None or mask is None:
        return
    in_transformers = bool(getattr(model, "_hf_peft_config_loaded", False))
    if not (in_transformers or isinstance(model, PeftModel)):
        _save(mask, Path(folder))
        write_card(folder, mask)
        return
    configs: Any = model.peft_config
    if in_transformers:
        # It saves the active adapter alone, whatever its name, into the folder itself.
        (active,) = model.active_adapters()  # type: ignore[operator]
        folders = {active: Path(folder)}
    else:
        folders = {name: _adapter_folder(folder, name) for name in adapters or configs}
    parts = {}
    for adapter, where in folders.items():
        part = state.mask(functools.partial(_belongs_to, configs, adapter))
        if part is not None and where.is_dir():
            parts[adapter] = part
            _save(part, where)
    if parts:
        described = parts[active] if in_transformers else mask
        write_card(folder, described, adapter=next(iter(parts)), in_transformers=in_transformers)


def _save(mask: FishMask, folder: Path) -> None:
    """Write a mask beside the weights in a folder, and which weights these are."""
    found = (path for path in folder.iterdir() if _WEIGHTS.fullmatch(path.name))
    mask.save_pretrained(folder, weights=sorted(found))


def _adapter_folder(folder: str, adapter: str) -> Path:
    return Path(folder) if adapter == "default" else Path(folder, adapter)


def _belongs_to(configs: Mapping[str, Any], adapter: str, name: str) -> bool:
    """Whether a tensor is not of another adapter: biases of the base are saved with each."""
    others = configs.keys() - {adapter}
    return not any(belongs_to_adapter(name, other) for other in others)


def check_checkpoint(model: nn.Module, checkpoint: str) -> None:
    """Check that a checkpoint was trained with the mask of the model.

    Raises:
        ValueError: It was trained with another.
        FileNotFoundError: It has no mask.
    """
    state = state_of(model)
    if state is None or mask_of_checkpoint(model, checkpoint) != state.mask():
        folder = mask_folders(model, checkpoint)[0]
        raise ValueError(
            f"{checkpoint} was trained with another mask: resume with "
            f"FishMask.from_pretrained({str(folder)!r}) as the mask"
        )


def saves_itself(model: nn.Module) -> bool:
    """Whether a Trainer calls the model's own save_pretrained; of others it writes the weights."""
    return isinstance(model, PreTrainedModel | PeftModel)


def patch_trainers() -> None:
    """Have all Trainers that there are, TRL's too, describe masks in cards and check checkpoints.

    A Trainer asks neither its callbacks nor the model once its card is written, and uploads it at
    once; nor when it saves or loads a checkpoint of FSDP. So these methods are wrapped, in each
    class that has its own. With a model without a mask they do what they did.
    """
    trainers = sys.modules.get("transformers.trainer")
    kinds = [] if trainers is None else [trainers.Trainer]
    for kind in kinds:
        kinds += kind.__subclasses__()
        for name, wrap in _OF_TRAINERS.items():
            own = vars(kind).get(name)
            if own is not None and not hasattr(own, "knows_masks"):
                wrapped = wrap(own)
                wrapped.knows_masks = True  # type: ignore[attr-defined]
                setattr(kind, name, wrapped)


def _with_mask_in_card(create_model_card: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(create_model_card)
    def create(self: Any, *args: Any, **kwargs: Any) -> None:
        create_model_card(self, *args, **kwargs)
        if self.is_world_process_zero():
            write_mask(self.model, str(self.args.output_dir))

    return create


def _with_mask_checked(load_from_checkpoint: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(load_from_checkpoint)
    def load(self: Any, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        if state_of(self.model) is not None:
            try:
                check_checkpoint(self.model, resume_from_checkpoint)
            except FileNotFoundError:
                # Nobody writes one for a plain module in a Trainer without our callback.
                if saves_itself(self.model):
                    raise
        load_from_checkpoint(self, resume_from_checkpoint, *args, **kwargs)

    return load


def _with_mask_beside_shards(save_training_state: Callable[..., None]) -> Callable[..., None]:
    """FSDP2 saves sharded checkpoints in the place of an adapter that would bring its mask."""

    @functools.wraps(save_training_state)
    def save(self: Any, output_dir: str, *args: Any, **kwargs: Any) -> None:
        save_training_state(self, output_dir, *args, **kwargs)
        state = state_of(self.model)
        if state is None or not (self.is_fsdp_enabled and self.args.should_save):
            return
        if (mask := state.mask()) is not None and not Path(output_dir, JSON_FILE).is_file():
            _save(mask, Path(output_dir))

    return save


def _with_folder(save_model: Callable[..., None]) -> Callable[..., None]:
    """A Trainer looks next whether there is a folder, to know which checkpoint is the best.

    With sharded checkpoints of FSDP2 there is none yet, but another process may be about to write
    one, and processes that disagree would load different checkpoints in the end.
    """

    @functools.wraps(save_model)
    def save(self: Any, output_dir: str | None = None, **options: Any) -> None:
        save_model(self, output_dir, **options)
        internal = options.get("_internal_call", False)
        if output_dir and internal and state_of(self.model) and self.is_fsdp_enabled:
            Path(output_dir).mkdir(parents=True, exist_ok=True)

    return save


_OF_TRAINERS = {
    "save_model": _with_folder,
    "create_model_card": _with_mask_in_card,
    "_load_from_checkpoint": _with_mask_checked,
    "_save_optimizer_and_scheduler": _with_mask_beside_shards,
}


def _gathered(model: nn.Module, save_embedding_layers: bool | str) -> dict[str, Any]:
    """The state dict of a model that `fully_shard` has divided, with what is to be saved complete.

    All processes have to call. What PEFT does not save, the frozen base model, stays divided.

    Args:
        model: The model.
        save_embedding_layers: As in PEFT's save_pretrained.
    """
    tensors = model.state_dict()
    chosen = [tensors]
    if isinstance(model, PeftModel):
        option: Any = {"save_embedding_layers": save_embedding_layers}
        chosen = [
            get_peft_model_state_dict(model, tensors, adapter, **option)
            for adapter in model.peft_config
        ]
    saved = {id(tensor) for each in chosen for tensor in each.values()}
    return {name: whole(t) if id(t) in saved else t for name, t in tensors.items()}


def _save_pretrained(
    state: MaskState, model: Any, name: str, save_directory: str, *args: Any, **kwargs: Any
) -> Any:
    """The model's own save_pretrained, with the mask and its description beside what it writes."""
    given = kwargs.get("state_dict")
    if given is None and is_sharded(model):
        given = _gathered(model, kwargs.get("save_embedding_layers", "auto"))
    if given is None:
        _check_complete(state, model)
    # Trainers gather one from all processes, and then save it in the first.
    state.check(alone=given is not None)
    if given is not None:
        kwargs["state_dict"] = with_tensors(state, given)
    result = original(model, name)(save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True):
        write_mask(model, save_directory, kwargs.get("selected_adapters"))
    # Of Trainers imported since, too: one that pushes saves the model first.
    patch_trainers()
    return result


def _check_complete(state: MaskState, model: nn.Module) -> None:
    """Refuse to save the slices that a process holds of what ZeRO-3 trains.

    Raises:
        RuntimeError: It has.
    """
    values = (value for group in state.groups for value in group.trained())
    trainable = (parameter for parameter in model.parameters() if parameter.requires_grad)
    if any(map(is_in_zero_3, chain(values, trainable))):
        raise RuntimeError(
            "DeepSpeed ZeRO-3 leaves each process a part of the model: in all processes, gather it "
            "with state_dict = accelerator.get_state_dict(engine); then, in the first, call "
            "save_pretrained(folder, state_dict=state_dict)"
        )


def _upload_modified_files(
    state: MaskState, model: Any, name: str, working_dir: str, *args: Any, **kwargs: Any
) -> Any:
    """The model's own upload, of a folder whose card push_to_hub has just replaced."""
    write_mask(model, working_dir)
    return original(model, name)(working_dir, *args, **kwargs)


def _save_adapter(
    state: MaskState, model: Any, name: str, save_directory: str, *args: Any, **kwargs: Any
) -> Any:
    """The adapters library's save_adapter, with the mask beside what it writes."""
    _check_complete(state, model)
    state.check()
    result = original(model, name)(save_directory, *args, **kwargs)
    write_mask(model, save_directory)
    return result


def _load_adapter(
    state: MaskState,
    model: Any,
    name: str,
    model_id: str,
    adapter_name: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """PEFT's load_adapter, into an adapter that is masked: only what was trained with its mask.

    Raises:
        ValueError: The folder holds another mask.
    """
    mask = state.mask(lambda tensor: belongs_to_adapter(tensor, adapter_name))
    saved = Path(model_id, JSON_FILE).is_file()
    if mask is not None and saved:
        expected = state.mask(functools.partial(_belongs_to, model.peft_config, adapter_name))
        if FishMask.from_pretrained(model_id) != expected:
            raise ValueError(
                f"{model_id} was trained with another mask than adapter {adapter_name!r} has: mask "
                f"the model with FishMask.from_pretrained({str(model_id)!r}), or call "
                "remove_mask(model) before you load it"
            )
    return original(model, name)(model_id, adapter_name, *args, **kwargs)
