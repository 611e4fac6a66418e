"""One run: build an arm's model, select its mask, train it, and record the outcome."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

from fish_tuning.experiments.arms import Arm
from fish_tuning.experiments.models.adapters import add_adapter, trainable_tensors
from fish_tuning.experiments.models.checkpointing import enable_checkpointing
from fish_tuning.experiments.models.load import load_model
from fish_tuning.experiments.results import Evaluated, Run, tensor_densities
from fish_tuning.experiments.runs import processes
from fish_tuning.experiments.runs.arguments import training_arguments
from fish_tuning.experiments.runs.checkpoints import DatedByStep, newest_complete
from fish_tuning.experiments.runs.generative.evaluation import (
    evaluate_all,
    evaluate_before,
    generate_after,
    named_metrics,
)
from fish_tuning.experiments.runs.measurements import Measurements, Report, snapshot
from fish_tuning.experiments.runs.prepare import PreparedExperiment
from fish_tuning.experiments.runs.ranks import ChosenRanks, ranks_by_fisher
from fish_tuning.experiments.runs.record import (
    ADAPTER_FOLDER,
    CHECKPOINTS_FOLDER,
    SELECTION_FOLDER,
    now,
    run_record,
)
from fish_tuning.experiments.runs.scoring import Selection, select
from fish_tuning.experiments.runs.trainers import build_trainer
from fish_tuning.packing.supertuning import save_as_peft_adapter


def run_arm(arm: Arm, experiment: PreparedExperiment, folder: Path, report: Report) -> Run:
    """Carry out one run, or resume it if an earlier attempt was interrupted.

    All arms of a seed start from the same head, and from the same adapter if their ranks agree:
    the seed is set again before each of the two is created, and before training. With several
    processes, every process makes this call, and the main process writes.

    Args:
        arm: The arm.
        experiment: The experiment.
        folder: The run's own folder.
        report: Called at every step.

    Returns:
        The record of the finished run.

    Raises:
        CountError: The run did not train exactly its budget.
    """
    started = now()
    args = _arguments(arm, experiment, folder / CHECKPOINTS_FOLDER)
    ranks = selection = None
    if arm.chooses_ranks:
        ranks = _stored(ChosenRanks, folder, lambda: _choose_ranks(arm, experiment, args))
    model, may_train = start_of(arm, experiment, args, ranks.lora if ranks else None)
    if arm.criterion is not None:
        selection = _stored(Selection, folder, lambda: _select(model, arm, experiment, args))
    mask = selection.mask if selection else None
    scored = selection or ranks
    budget = experiment.counts[arm.key].trainable
    measurements = Measurements(snapshot(model, may_train), budget, report)
    trainer = build_trainer(model, experiment, args, mask, [measurements, DatedByStep()])
    before = evaluate_before(trainer, experiment) if arm.held_out is None else None
    _train(trainer, arm, folder, measurements)
    measurements.check_inside(mask, [name for name, trained in may_train.items() if trained])
    history = list(trainer.state.log_history)  # before the evaluation adds an entry of its own
    metrics = evaluate_all(trainer, experiment)
    generated = generate_after(trainer, experiment, before, folder)
    metrics |= generated.pop("metrics", {})
    adapter_bytes = processes.in_main(
        lambda: _save_adapter(trainer, folder / ADAPTER_FOLDER, measurements.start)
    )
    return run_record(
        arm,
        experiment,
        started,
        status="finished",
        trainable_params=measurements.trainable,
        changed_params=sum(measurements.changed_counts().values()),
        metrics=metrics,
        evaluated=_evaluated(trainer),
        metrics_before=before.metrics if before else {},
        **generated,
        **_curves(history, experiment.data.metrics),
        train_seconds=measurements.seconds,
        score_seconds=scored.seconds if scored else 0.0,
        peak_memory_bytes=measurements.memory.peak,
        peak_memory_of=measurements.memory.of,
        adapter_bytes=adapter_bytes,
        adapter=(Path(folder.parent.name) / folder.name / ADAPTER_FOLDER).as_posix(),
        mask_density=tensor_densities(mask) if mask is not None else [],
        score_histograms=scored.histograms if scored else [],
    )


def start_of(
    arm: Arm,
    experiment: PreparedExperiment,
    args: TrainingArguments,
    ranks: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, dict[str, bool]]:
    """Build an arm's model as it is before anything is trained, with the ranks chosen for it.

    Returns:
        The model, and for each tensor of its adapter and head whether the arm may train it.
    """
    config, data = experiment.config, experiment.data
    set_seed(arm.seed)
    base = load_model(
        config.model, experiment.tokenizer, data.num_labels, data.label_names, data.task
    )
    set_seed(arm.seed)
    steps = _total_steps(args, len(experiment.train))
    model = add_adapter(base, arm, config, total_steps=steps, ranks=ranks)
    # Trainer does so when it trains; scoring comes before.
    enable_checkpointing(model, config.training_args)
    if config.model.quantization is None:
        model.to(args.device)
    trainable = trainable_tensors(model)
    return model, {
        name: name in trainable
        for name, _ in model.named_parameters()
        if name in trainable or ".lora_" in name or ".modules_to_save." in name
    }


def _arguments(
    arm: Arm, experiment: PreparedExperiment, folder: Path, **changes: Any
) -> TrainingArguments:
    if arm.learning_rate is not None:
        changes["learning_rate"] = arm.learning_rate
    changes["run_name"] = arm.title  # what trackers call the run
    metrics = experiment.data.metrics
    return training_arguments(experiment.config, folder, arm.seed, metrics, **changes)


Choice = TypeVar("Choice", Selection, ChosenRanks)


def _stored(kind: type[Choice], folder: Path, choose: Callable[[], Choice]) -> Choice:
    """What an interrupted attempt chose and stored; else choose now, and store the result."""
    stored: Choice | None = processes.in_main(lambda: kind.load(folder / SELECTION_FOLDER))
    if stored is not None:
        return stored
    if processes.is_main():
        # They belong to a choice that is lost.
        shutil.rmtree(folder / CHECKPOINTS_FOLDER, ignore_errors=True)
    chosen = choose()
    if processes.is_main():
        chosen.save(folder / SELECTION_FOLDER)
    return chosen


def _choose_ranks(arm: Arm, experiment: PreparedExperiment, args: TrainingArguments) -> ChosenRanks:
    """Choose ranks by the scores of a LoRA of one rank, which is then thrown away."""
    model, _ = start_of(arm, experiment, args)
    set_seed(arm.seed)
    budget = experiment.counts[arm.key].trainable
    return ranks_by_fisher(
        model, arm, experiment.config, budget, experiment.train, experiment.collate
    )


def _select(
    model: nn.Module, arm: Arm, experiment: PreparedExperiment, args: TrainingArguments
) -> Selection:
    def warmup(steps: int) -> Trainer:
        without_saving = _arguments(
            arm,
            experiment,
            Path(args.output_dir or "."),
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            report_to="none",
        )
        return build_trainer(model, experiment, without_saving, None, [])

    set_seed(arm.seed)
    budget = experiment.counts[arm.key].trainable
    return select(
        model, arm, experiment.config, budget, experiment.train, experiment.collate, warmup
    )


def _train(trainer: Trainer, arm: Arm, folder: Path, measurements: Measurements) -> None:
    """Train from the newest intact checkpoint, or from the start."""
    masked = arm.criterion is not None
    checkpoint = processes.in_main(
        lambda: newest_complete(
            folder / CHECKPOINTS_FOLDER, masked=masked, processes=processes.count()
        )
    )
    set_seed(arm.seed)
    with measurements.memory:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _evaluated(trainer: Trainer) -> Evaluated:
    """Which weights the trained model has: those of the best checkpoint, or of the last step."""
    args, state = trainer.args, trainer.state
    if args.load_best_model_at_end and state.best_model_checkpoint is not None:
        step = int(Path(state.best_model_checkpoint).name.rpartition("-")[2])
        return Evaluated(step=step, best_by=args.metric_for_best_model)
    return Evaluated(step=state.global_step, best_by=None)


def _save_adapter(trainer: Trainer, folder: Path, start: Mapping[str, Tensor]) -> int:
    """Save adapter and mask, or the changes of the model's own weights as adapters of PEFT.

    Args:
        trainer: The Trainer of the trained model.
        folder: The folder to write.
        start: Copies of the tensors that may have changed, from before training.

    Returns:
        The size of the weights in bytes.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    shutil.rmtree(folder, ignore_errors=True)
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder))
    else:
        save_as_peft_adapter(model, folder, start={**model.state_dict(), **start})
    return sum(file.stat().st_size for file in folder.rglob("adapter_model.safetensors"))


def _total_steps(args: TrainingArguments, examples: int) -> int:
    if args.max_steps > 0:
        return args.max_steps
    batches = math.ceil(examples / (args.train_batch_size * processes.count()))
    return math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs)


def _curves(history: list[dict[str, float]], metrics: Sequence[str]) -> dict[str, Any]:
    """The record's two curves, from the entries that Trainer logged."""
    return {
        "curve": [
            {"step": entry["step"], "epoch": entry["epoch"], **named_metrics(entry, metrics)}
            for entry in history
            if "eval_loss" in entry
        ],
        "train_curve": [
            {"step": entry["step"], "loss": entry["loss"]}
            for entry in history
            if "loss" in entry and math.isfinite(entry["loss"])
        ],
    }
