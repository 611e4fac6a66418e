"""Choosing the entries that a masked arm trains: calibration set, warm-up, scores, mask."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from fish_tuning.config import Criterion, FishConfig
from fish_tuning.experiments.arms import Arm
from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.models.adapters import trainable_tensors
from fish_tuning.experiments.models.counts import names_left_dense
from fish_tuning.experiments.results import ScoreHistogram, write_json
from fish_tuning.experiments.runs.measurements import snapshot
from fish_tuning.experiments.runs.release import release_model
from fish_tuning.fish_model import score_and_select
from fish_tuning.mask.mask import FishMask
from fish_tuning.names import side_of

logger = logging.getLogger(__name__)

_RECORD = "selection.json"
_BINS = 60


class _Record(BaseModel):
    score_seconds: float
    score_histograms: list[ScoreHistogram]


@dataclass(frozen=True)
class Selection:
    """A mask, and what it took to choose it.

    Attributes:
        mask: The entries to train.
        seconds: Time of scoring and selecting, warm-up included.
        histograms: Fisher information by kind of tensor; empty if it was not computed.
    """

    mask: FishMask
    seconds: float
    histograms: list[ScoreHistogram]

    def save(self, folder: Path) -> None:
        """Write it where a resumed run finds it."""
        self.mask.save_pretrained(folder)
        # Written last: if this file is there, the mask is complete.
        record = _Record(score_seconds=self.seconds, score_histograms=self.histograms)
        write_json(folder / _RECORD, record)

    @classmethod
    def load(cls, folder: Path) -> Selection | None:
        """Read a selection that `save` wrote completely; None if there is none."""
        try:
            record = _Record.model_validate_json((folder / _RECORD).read_bytes())
            mask = FishMask.from_pretrained(folder)
        except (OSError, ValueError):
            return None
        return cls(mask, record.score_seconds, record.score_histograms)


def select(
    model: nn.Module,
    arm: Arm,
    config: ExperimentConfig,
    budget: int,
    train: Any,
    collate: Callable[[Any], Any],
    warmup: Callable[[int], Trainer],
) -> Selection:
    """Score a model's trainable parameters and choose as many as the budget allows.

    Args:
        model: The model with its adapter, before training. It is left as it was.
        arm: A masked arm.
        config: The experiment.
        budget: Parameters to train in total, head included.
        train: Tokenized training examples.
        collate: Makes a batch of some of them.
        warmup: Builds a Trainer for that many steps; called for the scoring point "warmup".
    """
    assert arm.criterion is not None
    began = time.perf_counter()
    rule = config.fish_tuning.rule_of(arm.variant)
    sizes = {name: tensor.numel() for name, tensor in trainable_tensors(model).items()}
    excluded = names_left_dense(config, sizes, budget)
    settings = settings_of(
        arm, config, arm.criterion, num_trainable=budget, names_to_exclude=excluded
    )
    steps = rule.warmup_steps if rule.scoring_point == "warmup" else None
    batches = calibration_set(settings, config, train, collate)
    warm = steps is not None and settings.uses_fisher
    with _after_warmup(model, rule.warmup_steps, warmup) if warm else nullcontext():
        mask, information = score_and_select(
            model,
            settings,
            batches,
            progress=False,
            provenance={"scoring_point": rule.scoring_point, "warmup_steps": steps},
        )
    histograms = [] if information is None else score_histograms(information)
    return Selection(mask, time.perf_counter() - began, histograms)


def settings_of(
    arm: Arm,
    config: ExperimentConfig,
    criterion: Criterion,
    *,
    num_trainable: int,
    names_to_exclude: Sequence[str] = (),
) -> FishConfig:
    """The settings by which an arm scores and selects."""
    return config.fish_tuning.rule_of(arm.variant).fish_config(
        criterion,
        num_trainable=num_trainable,
        names_to_exclude=names_to_exclude,
        seed=arm.seed if config.fish_tuning.seed is None else config.fish_tuning.seed,
    )


def calibration_set(
    settings: FishConfig, config: ExperimentConfig, train: Any, collate: Callable[[Any], Any]
) -> DataLoader[Any]:
    """Batches of the training examples to score with, drawn at random."""
    rows = np.random.default_rng(settings.seed).permutation(len(train))[: settings.num_samples]
    return DataLoader(
        train.select(rows),
        batch_size=config.training_args.get("per_device_train_batch_size", 8),
        collate_fn=collate,
    )


@contextmanager
def _after_warmup(model: nn.Module, steps: int, warmup: Callable[[int], Trainer]) -> Iterator[None]:
    """Takes the first training steps, and undoes them when the block ends."""
    start = snapshot(model, trainable_tensors(model))
    training = model.training
    try:
        trainer = warmup(steps)
        trainer.add_callback(_StopAfter(steps))
        trainer.train()
        release_model(trainer, model)
        yield
    finally:
        with torch.no_grad():
            for name, parameter in trainable_tensors(model).items():
                parameter.copy_(start[name])
                parameter.grad = None
        model.train(training)


class _StopAfter(TrainerCallback):
    """Stops training early, without changing the learning rate schedule of its first steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= self.steps


def score_histograms(scores: Mapping[str, Tensor]) -> list[ScoreHistogram]:
    """Distribution of the scores of LoRA's A, its B and all other tensors, by powers of ten."""
    kinds: dict[str, list[Tensor]] = {}
    for name, tensor in scores.items():
        side = side_of(name)
        flat = tensor.detach().reshape(-1).to("cpu", torch.float64)
        kinds.setdefault(f"lora_{side}" if side else "other", []).append(flat)
    histograms = []
    for kind, parts in sorted(kinds.items()):
        flat = torch.cat(parts)
        logs = flat[flat > 0].log10()
        low, high = (float(logs.min()), float(logs.max())) if len(logs) else (0.0, 1.0)
        if high - low < 1e-6:
            low, high = low - 0.5, high + 0.5
        counts, edges = torch.histogram(logs, _BINS, range=(low, high))
        histograms.append(
            ScoreHistogram(
                kind=kind,
                zeros=int((flat == 0).sum()),
                log10_edges=edges.tolist(),
                counts=counts.long().tolist(),
            )
        )
    return histograms
