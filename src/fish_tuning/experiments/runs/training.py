"""One run: a model, an arm's adapter, a mask, a training, and the record of it."""

from __future__ import annotations

import gc
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import AdaLoraModel
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from fish_tuning.experiments.arms import Arm, ArmKey
from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.data.load import TaskData, hold_out
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.metrics import compute_metrics_for, greater_is_better, main_metric
from fish_tuning.experiments.models.adapters import add_adapter, trainable_tensors
from fish_tuning.experiments.models.counts import ParameterCounts
from fish_tuning.experiments.models.load import load_model
from fish_tuning.experiments.results import Run, TensorDensity
from fish_tuning.experiments.runs import environment, processes
from fish_tuning.experiments.runs.checkpoints import DatedByStep, newest_complete
from fish_tuning.experiments.runs.measurements import Measurements, Report, snapshot
from fish_tuning.experiments.runs.scoring import Selection, select
from fish_tuning.mask.mask import FishMask
from fish_tuning.trainer import FishTuningTrainer

logger = logging.getLogger(__name__)

ADAPTER_FOLDER = "adapter"
CHECKPOINTS_FOLDER = "checkpoints"
SELECTION_FOLDER = "selection"


@dataclass(frozen=True)
class Task:
    """What all runs of an experiment share.

    Attributes:
        config: The experiment.
        data: The task and its examples as text.
        train: Tokenised training examples.
        validation: Tokenised validation examples.
        tokenizer: The model's tokenizer.
        counts: Parameters by arm and ratio.
        commit: Git commit of the working folder.
    """

    config: ExperimentConfig
    data: TaskData
    train: Dataset
    validation: Dataset
    tokenizer: PreTrainedTokenizerBase
    counts: Mapping[ArmKey, ParameterCounts]
    commit: str | None

    def holding_out(self, size: int) -> Task:
        """The same, evaluated on training examples that are not trained on."""
        train, held_out = hold_out(self.train, "labels", size, self.data.task)
        return replace(self, train=train, validation=held_out)

    @property
    def collate(self) -> DataCollatorWithPadding:
        """Pads the examples of a batch to the longest of them."""
        return DataCollatorWithPadding(self.tokenizer)


def training_arguments(
    config: ExperimentConfig,
    folder: Path,
    seed: int,
    metrics: Sequence[str] = ("loss",),
    **changes: Any,
) -> TrainingArguments:
    """The transformers.TrainingArguments of a run.

    Args:
        config: The experiment.
        folder: Where its checkpoints go.
        seed: The run's seed.
        metrics: What is computed at evaluations, the main metric first.
        **changes: Laid over what the experiment says.

    Raises:
        ConfigError: transformers refuses them, or the best model is to be chosen by a metric that
            is not computed.
    """
    args = dict(config.training_args)
    if "logging_steps" not in args and (
        "eval_steps" in args or args.get("eval_strategy") != "steps"
    ):
        # transformers' 500 is more than many fine-tunings have; it is eval_steps' default too.
        args["logging_steps"] = 10
    args["metric_for_best_model"], args["greater_is_better"] = best_by(config, metrics)
    args.setdefault("report_to", "none")
    args.setdefault("save_total_limit", 2)
    args.setdefault("log_level_replica", "error")
    # For losses that are a mean over a batch's tokens. Those of classifiers would be multiplied
    # by the number of processes.
    args.setdefault("average_tokens_across_devices", False)
    args.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    # Left to itself, transformers takes bf16 for a wish for an accelerator.
    args.setdefault("use_cpu", not torch.accelerator.is_available())
    args |= {
        "output_dir": str(folder.absolute()),
        "seed": seed,
        "data_seed": seed,
        "label_names": ["labels"],
        "disable_tqdm": True,
        **changes,
    }
    try:
        return TrainingArguments(**args)
    # Its checks raise whatever they come upon, also from torch and accelerate.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"base_training.args, training.args_override: transformers refuses them: {reason}; "
            "correct the argument"
        ) from error


def best_by(config: ExperimentConfig, metrics: Sequence[str]) -> tuple[str, bool]:
    """What models are compared by: `metric_for_best_model`, and whether greater is better.

    Args:
        config: The experiment.
        metrics: What is computed at evaluations, the main metric first.

    Raises:
        ConfigError: That metric is not computed.
    """
    args = config.training_args
    chosen = args.get("metric_for_best_model", main_metric(metrics))
    name = str(chosen).removeprefix("eval_")
    if name not in (*metrics, "loss"):
        raise ConfigError(
            f"base_training.args.metric_for_best_model: {chosen!r} is not computed; use one of "
            f"{', '.join((*metrics, 'loss'))}"
        )
    greater = args.get("greater_is_better")
    if greater is None:
        greater = name != "loss" and greater_is_better(name)
    return chosen, greater


def _arguments(arm: Arm, task: Task, folder: Path, **changes: Any) -> TrainingArguments:
    if arm.learning_rate is not None:
        changes["learning_rate"] = arm.learning_rate
    return training_arguments(task.config, folder, arm.seed, task.data.metrics, **changes)


def run_arm(arm: Arm, task: Task, folder: Path, report: Report) -> Run:
    """Carry out one run, going on from where an earlier attempt was interrupted.

    All arms of a seed get the same head, and where their ranks agree the same adapter: the seed
    is set anew before each of them is made, and again before training. Where there are several
    processes, all of them call; the main one writes.

    Args:
        arm: The arm.
        task: What the runs share.
        folder: The run's own folder.
        report: Told of every step.

    Returns:
        The record of the finished run.

    Raises:
        CountError: It did not train what it was to train.
    """
    started = _now()
    config, counts = task.config, task.counts[arm.key]
    metrics = task.data.metrics
    checkpoints = folder / CHECKPOINTS_FOLDER
    args = _arguments(arm, task, checkpoints)
    model, trained = start_of(arm, task, args)

    selection, score_seconds = None, 0.0
    if arm.criterion is not None:
        selection = processes.in_main(lambda: Selection.load(folder / SELECTION_FOLDER))
        if selection is None:
            if processes.is_main():
                shutil.rmtree(checkpoints, ignore_errors=True)
            selection = _select(model, arm, task, args)
            if processes.is_main():
                selection.save(folder / SELECTION_FOLDER)
        score_seconds = selection.seconds
    start = snapshot(model, trained)

    measurements = Measurements(start, counts.trainable, report)
    callbacks = [measurements, DatedByStep()]
    trainer = _trainer(model, task, args, selection.mask if selection else None, callbacks)
    checkpoint = processes.in_main(
        lambda: newest_complete(
            checkpoints, masked=selection is not None, processes=processes.count()
        )
    )
    set_seed(arm.seed)
    with measurements.memory:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    measurements.check_inside(
        selection.mask if selection else None,
        [name for name, may_train in trained.items() if may_train],
    )
    history = list(trainer.state.log_history)
    final = trainer.evaluate()

    adapter = folder / ADAPTER_FOLDER
    unwrapped: Any = trainer.accelerator.unwrap_model(trainer.model)

    def save() -> int:
        shutil.rmtree(adapter, ignore_errors=True)
        unwrapped.save_pretrained(str(adapter))
        return (adapter / "adapter_model.safetensors").stat().st_size

    adapter_bytes = processes.in_main(save)
    return Run(
        run_id=arm.run_id,
        arm=arm.name,
        ratio=arm.ratio,
        seed=arm.seed,
        learning_rate=arm.learning_rate,
        held_out=arm.held_out,
        status="finished",
        config=config.model_dump(mode="json"),
        budget=counts.trainable,
        trainable_params=measurements.trainable,
        changed_params=sum(measurements.changed_counts().values()),
        total_params=counts.total,
        main_metric=main_metric(metrics),
        metrics=_named(final, metrics),
        curve=[
            {"step": entry["step"], "epoch": entry["epoch"], **_named(entry, metrics)}
            for entry in history
            if "eval_loss" in entry
        ],
        train_curve=[
            {"step": entry["step"], "loss": entry["loss"]}
            for entry in history
            if "loss" in entry and math.isfinite(entry["loss"])
        ],
        train_seconds=measurements.seconds,
        score_seconds=score_seconds,
        peak_memory_bytes=measurements.memory.peak,
        peak_memory_of=measurements.memory.of,
        adapter_bytes=adapter_bytes,
        adapter=(Path(folder.parent.name) / folder.name / ADAPTER_FOLDER).as_posix(),
        mask_density=_densities(selection.mask) if selection else [],
        score_histograms=selection.histograms if selection else [],
        versions=environment.versions(),
        commit=task.commit,
        hardware=environment.hardware(),
        started_at=started,
        finished_at=_now(),
    )


def failed_run(arm: Arm, task: Task, error: Exception, started: str) -> Run:
    """The record of a run that failed."""
    counts = task.counts[arm.key]
    return Run(
        run_id=arm.run_id,
        arm=arm.name,
        ratio=arm.ratio,
        seed=arm.seed,
        learning_rate=arm.learning_rate,
        held_out=arm.held_out,
        status="failed",
        error=f"{type(error).__name__}: {error}",
        config=task.config.model_dump(mode="json"),
        budget=counts.trainable,
        total_params=counts.total,
        main_metric=main_metric(task.data.metrics),
        versions=environment.versions(),
        commit=task.commit,
        hardware=environment.hardware(),
        started_at=started,
        finished_at=_now(),
    )


def discard_temporary(folder: Path) -> None:
    """Remove what only an interrupted run needs."""
    for name in (CHECKPOINTS_FOLDER, SELECTION_FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)


def free_memory() -> None:
    """Give back what the last run held, so that the next starts as that one did."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def start_of(arm: Arm, task: Task, args: TrainingArguments) -> tuple[nn.Module, dict[str, bool]]:
    """Build an arm's model as it is before anything is trained.

    Returns:
        The model, and the names of its adapter's and head's tensors; True where they may train.
    """
    config, data = task.config, task.data
    set_seed(arm.seed)
    base = load_model(config.model, task.tokenizer, data.num_labels, data.label_names, data.task)
    set_seed(arm.seed)
    model = add_adapter(base, arm, config, total_steps=_total_steps(args, len(task.train)))
    if config.model.quantization is None:
        model.to(args.device)
    trainable = trainable_tensors(model)
    adapter = [
        name
        for name, _ in model.named_parameters()
        if name in trainable or ".lora_" in name or ".modules_to_save." in name
    ]
    return model, {name: name in trainable for name in adapter}


def _select(model: nn.Module, arm: Arm, task: Task, args: TrainingArguments) -> Selection:
    def warmup(steps: int) -> Trainer:
        without = _arguments(
            arm,
            task,
            Path(args.output_dir or "."),
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
        )
        return _trainer(model, task, without, None, [])

    set_seed(arm.seed)
    budget = task.counts[arm.key].trainable
    return select(model, arm, task.config, budget, task.train, task.collate, warmup)


def _trainer(
    model: nn.Module,
    task: Task,
    args: TrainingArguments,
    mask: FishMask | None,
    callbacks: list[TrainerCallback],
) -> Trainer:
    options: dict[str, Any] = {
        "model": model,
        "args": args,
        "train_dataset": task.train,
        "eval_dataset": task.validation,
        "data_collator": task.collate,
        "compute_metrics": compute_metrics_for(task.data.metrics),
        "callbacks": callbacks,
    }
    if isinstance(getattr(model, "base_model", None), AdaLoraModel):
        options["callbacks"] = [_Reallocation(), *callbacks]
    trainer = Trainer(**options) if mask is None else FishTuningTrainer(mask=mask, **options)
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Reallocation(TrainerCallback):
    """AdaLoRA's rank allocation, which it leaves to the training loop."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].base_model.update_and_allocate(state.global_step)


def _total_steps(args: TrainingArguments, examples: int) -> int:
    if args.max_steps > 0:
        return args.max_steps
    batches = math.ceil(examples / (args.train_batch_size * processes.count()))
    return math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs)


def _named(entry: Mapping[str, float], metrics: Sequence[str]) -> dict[str, float]:
    """An evaluation's loss and metrics, these under their own names."""
    values = {"eval_loss": entry["eval_loss"]}
    values |= {name: entry[f"eval_{name}"] for name in metrics}
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def _densities(mask: FishMask) -> list[TensorDensity]:
    return [
        TensorDensity(name=name, selected=int(bits.sum()), entries=bits.numel())
        for name, bits in mask.items()
    ]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
