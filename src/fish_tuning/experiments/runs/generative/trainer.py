"""TRL's SFTTrainer, with evaluations that do not depend on how examples are batched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fish_tuning.experiments.metrics.tokens import compute_token_metrics, token_sums


class GenerativeTrainer(SFTTrainer):
    """Trains as SFTTrainer does, and evaluates every token once and with the same weight.

    SFTTrainer averages the losses of batches, although batches differ in the number of tokens.
    Here each row's sums are collected, so that loss and perplexity are those of the whole set,
    whatever the batch size and the number of processes. Rows are never packed for an evaluation.

    Args:
        model: The model with its adapter. Trainable parameters keep their type.
        args: What SFTTrainer is to do.
        **kwargs: Everything else that SFTTrainer takes.
    """

    def __init__(self, model: Any, args: SFTConfig, **kwargs: Any) -> None:
        with _seen_as_not_quantized(model):
            super().__init__(model, args, compute_metrics=compute_token_metrics, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Pad the rows of an evaluation, even if those of training are packed."""
        of_training, tokenizer = self.data_collator, self.processing_class
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        self.data_collator = DataCollatorForLanguageModeling(tokenizer.pad_token_id)
        try:
            loader: DataLoader[Any] = super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = of_training
        return loader

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Return each row's sums in the place of logits; see `token_sums`."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = token_sums(model(**inputs, use_cache=False).logits, labels)
        # Without labels, Trainer would not compute metrics.
        return None, sums, sums[:, 2]


@contextmanager
def _seen_as_not_quantized(model: nn.Module) -> Iterator[None]:
    """Keep SFTTrainer from casting the adapters of quantized models to bfloat16.

    Small updates would be rounded away there, and the arms' parameters would no longer be float32.
    """
    flags = ("is_loaded_in_4bit", "is_loaded_in_8bit")
    holders = [module for module in model.modules() if any(flag in vars(module) for flag in flags)]
    before = [{flag: vars(module).get(flag) for flag in flags} for module in holders]
    try:
        for module in holders:
            for flag in flags:
                setattr(module, flag, False)
        yield
    finally:
        for module, values in zip(holders, before, strict=True):
            for flag, value in values.items():
                if value is None:
                    delattr(module, flag)
                else:
                    setattr(module, flag, value)
