"""A Trainer that masks its model."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from fish_tuning.callback import FishTuningCallback
from fish_tuning.config import FishConfig
from fish_tuning.fish_model import check_config
from fish_tuning.from_trainer.masking import attach_mask, mask_trainer
from fish_tuning.mask.checkpoint import mask_of_checkpoint
from fish_tuning.sparse.apply import is_masked
from fish_tuning.sparse.saving import check_checkpoint, saves_itself, write_mask

__all__ = ["FishTuningCallback", "FishTuningTrainer"]


class FishTuningTrainer(Trainer):
    """transformers' Trainer for a masked model.

    With a `fish_config`, `train()` first scores and masks the model (`mask_trainer`). It does so at
    that point because a subclass may set what its `compute_loss` needs after this constructor, and
    because a run that resumes takes the mask of its checkpoint and need not score again.

    Checkpoints and saved models hold the usual files, with the mask beside them and its
    description in the model card. A checkpoint of another mask is refused.

    Args:
        model: The model; masked in place.
        args: transformers' `TrainingArguments`.
        mask: What to train, see `apply_mask`. None for a model that is masked already, or with a
            `fish_config`.
        fish_config: What to select when training starts, see `mask_trainer`.
        callbacks: Further callbacks.
        **kwargs: Everything else that `Trainer` takes.

    Raises:
        ValueError: See `apply_mask`; or there is neither a mask nor a `fish_config` and the model
            has no mask; or there are two of these.

    Examples:
        >>> trainer = FishTuningTrainer(
        ...     model, arguments, train_dataset=data, fish_config=FishConfig(keep_ratio=0.5)
        ... )
        >>> result = trainer.train()
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        mask: Mapping[str, Tensor] | None = None,
        fish_config: FishConfig | None = None,
        callbacks: list[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if fish_config is not None:
            check_config(fish_config)
        self.fish_config = fish_config
        if fish_config is None:
            callbacks = [FishTuningCallback(mask), *(callbacks or [])]
        elif mask is not None or (model is not None and is_masked(model)):
            raise ValueError("give fish_config or a mask (of the model, or as mask=), not both")
        super().__init__(model=model, args=args, callbacks=callbacks, **kwargs)

    @property
    def masked_model(self) -> nn.Module:
        """The model without what engines wrap around it."""
        assert isinstance(self.model, nn.Module)
        return self.model

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if not saves_itself(self.masked_model) and self.args.should_save:
            write_mask(self.masked_model, str(output_dir or self.args.output_dir))

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train, as transformers' Trainer does.

        Raises:
            ValueError: The checkpoint to resume from was trained with another mask; or as in
                `mask_trainer`.
        """
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)  # type: ignore[no-untyped-call]
        if self.fish_config is not None and not is_masked(self.masked_model):
            if checkpoint:
                attach_mask(self, mask_of_checkpoint(self.masked_model, str(checkpoint)))
            else:
                mask_trainer(self, self.fish_config, progress=not self.args.disable_tqdm)
        # Here, as engines load their checkpoints in ways of their own.
        if checkpoint:
            check_checkpoint(self.masked_model, str(checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)
