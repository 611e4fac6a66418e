"""FISH-Tuning in the training loop of any transformers-style Trainer: a callback."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fish_tuning.arguments import check_mask
from fish_tuning.fsdp_plugin import check_settings
from fish_tuning.masked_tensors.tensors import tensor_named
from fish_tuning.parts import Part
from fish_tuning.selection.learning_rate import advice_on_rate
from fish_tuning.sparse.apply import (
    apply_mask,
    check_fits_model,
    get_mask,
    is_masked,
    masked_parameters,
)
from fish_tuning.sparse.saving import patch_trainers, saves_itself, write_mask

logger = logging.getLogger(__name__)


class FishTuningCallback(TrainerCallback):
    """Masks the model of any transformers-style Trainer (TRL's among them).

    Pass it among the `callbacks` with which you build the Trainer: the mask is applied when the
    Trainer is complete, before it has an optimizer.

    Args:
        mask: What to train, see `apply_mask`. None for a model that is masked already.

    Examples:
        >>> trainer = Trainer(
        ...     model, arguments, train_dataset=data, callbacks=[FishTuningCallback(mask)]
        ... )
        >>> result = trainer.train()
    """

    def __init__(self, mask: Mapping[str, Tensor] | None = None) -> None:
        if mask is not None:
            check_mask("mask", mask)
        self.mask = mask
        self._diverged = False

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Apply the mask.

        Raises:
            ValueError: See `apply_mask`; or neither the callback nor the model has a mask; or the
                Trainer has copied the adapter of a model that was masked already; or the Trainer
                is to use FSDP1, or FSDP2 with CPU offload; or DeepSpeed ZeRO-3 would keep it from
                saving the model.
        """
        check_settings(args)
        model = kwargs["model"]
        _check_saves(args.deepspeed_plugin, model)
        patch_trainers()
        if self.mask is not None:
            apply_mask(model, self.mask)
        elif not is_masked(model):
            raise ValueError("no mask: pass one, or mask the model first (get_fish_model)")
        else:
            _check_reference(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the optimizer is about to train what the mask selects.

        Raises:
            RuntimeError: The model has no mask, or no longer fits it, or the optimizer was built
                before the model was masked.
        """
        model = kwargs["model"]
        if not is_masked(model):
            raise RuntimeError(
                "the model has no mask: FishTuningCallback came after the Trainer was built. Pass "
                "it in callbacks=[...]; model_init is not supported"
            )
        check_fits_model(model)
        if args.deepspeed_plugin is not None:
            return  # Its optimizer holds tensors of its own.
        held = {id(p) for group in kwargs["optimizer"].param_groups for p in group["params"]}
        values = [value for value in masked_parameters(model) if value.requires_grad]
        if values and not any(id(value) in held for value in values):
            raise RuntimeError(
                "the optimizer was built before the mask was applied and holds none of the "
                "selected values: apply the mask first, or let the Trainer build the optimizer"
            )
        mask = get_mask(model)
        advice = None if mask is None else advice_on_rate(mask, kwargs["optimizer"])
        if advice is not None and state.is_world_process_zero:
            logger.warning("%s", advice)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the mask into the checkpoint of a model that has no save_pretrained to do it."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if args.should_save and not saves_itself(kwargs["model"]) and folder.is_dir():
            write_mask(kwargs["model"], str(folder))

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the mask and its description into the folder that a Trainer uploads.

        The Trainer copies only weights and config of a checkpoint there.
        """
        if state.is_world_process_zero:
            write_mask(kwargs["model"], str(args.output_dir))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warn, once, when a trained value is no longer finite: the logged loss may hide it."""
        if self._diverged:
            return
        # Of divided values, each process looks at its part.
        values = [Part(value).local for value in masked_parameters(kwargs["model"])]
        # One wait for an accelerator, instead of one for each parameter.
        wrong = sum((~value.detach().isfinite()).sum().to(values[0].device) for value in values)
        if wrong:
            self._diverged = True
            logger.warning(
                "Training has diverged: at step %d, %d of %d selected values are not finite, and "
                "they will stay so. Stop, and continue from an earlier checkpoint with a lower "
                "learning rate (Trainer's logging_nan_inf_filter leaves such losses out of its "
                "log)",
                state.global_step,
                wrong,
                sum(value.numel() for value in values),
            )


def _check_saves(deepspeed: Any, model: nn.Module) -> None:
    """Refuse settings of ZeRO-3 with which Trainers save no weights, except those of adapters."""
    if deepspeed is None or deepspeed.zero_stage != 3 or isinstance(model, PeftModel):
        return
    key = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    if not deepspeed.hf_ds_config.is_true(key):
        raise ValueError(
            f"with DeepSpeed ZeRO-3, the Trainer would save the model without weights: set {key} "
            "to true"
        )


def _check_reference(model: nn.Module) -> None:
    """Refuse the adapter "ref" of TRL's DPOTrainer, which copies parameters, not masked tensors."""
    parameters = dict(model.named_parameters())
    for name in get_mask(model) or ():
        reference = parameters.get(name.replace(".default.", ".ref."))
        if reference is not None and not torch.equal(reference, tensor_named(model, name)):
            raise ValueError(
                "the adapter 'ref', with which DPO compares, lacks what was masked before the "
                "Trainer was built: leave the model as it is and pass FishTuningCallback(mask)"
            )
