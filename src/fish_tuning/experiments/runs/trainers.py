"""The Trainer of a run: transformers' own for classification, TRL's for language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import AdaLoraModel
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from fish_tuning.experiments.metrics.classification import compute_metrics_for
from fish_tuning.mask.mask import FishMask
from fish_tuning.trainer import FishTuningCallback, FishTuningTrainer

if TYPE_CHECKING:
    from fish_tuning.experiments.runs.prepare import PreparedExperiment


def build_trainer(
    model: nn.Module,
    experiment: PreparedExperiment,
    args: TrainingArguments,
    mask: FishMask | None,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """Build the Trainer of a run.

    Args:
        model: The arm's model.
        experiment: The experiment.
        args: The training arguments; of a language model, an SFTConfig.
        mask: What a masked arm trains.
        callbacks: Further callbacks.
    """
    if isinstance(getattr(model, "base_model", None), AdaLoraModel):
        callbacks = [_Reallocation(), *callbacks]
    options: dict[str, Any] = {
        "model": model,
        "args": args,
        "train_dataset": experiment.train,
        "eval_dataset": experiment.validation,
        "processing_class": experiment.tokenizer,
    }
    if experiment.config.is_generative:
        from fish_tuning.experiments.runs.generative.trainer import GenerativeTrainer

        masking = [] if mask is None else [FishTuningCallback(mask)]
        trainer: Trainer = GenerativeTrainer(callbacks=[*masking, *callbacks], **options)
    else:
        del options["processing_class"]
        options["data_collator"] = experiment.collate
        options["compute_metrics"] = compute_metrics_for(experiment.data.metrics)
        options["callbacks"] = callbacks
        trainer = Trainer(**options) if mask is None else FishTuningTrainer(mask=mask, **options)
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Reallocation(TrainerCallback):
    """Calls AdaLoRA's rank allocation, which PEFT leaves to the training loop."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].base_model.update_and_allocate(state.global_step)
