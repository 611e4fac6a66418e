"""Choosing the ranks of LoRA-FISH-ranks, before its model is built."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from torch import nn

from fish_tuning.experiments.arms import Arm
from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.models.ranks import choose_ranks
from fish_tuning.experiments.results import ScoreHistogram, write_json
from fish_tuning.experiments.runs.scoring import calibration_set, score_histograms, settings_of
from fish_tuning.scoring.fisher import score_with_perturbed_b

_RECORD = "ranks.json"


class _Record(BaseModel):
    lora: dict[str, Any]
    score_seconds: float
    score_histograms: list[ScoreHistogram]


@dataclass(frozen=True)
class ChosenRanks:
    """A rank for each module, and what it took to choose them.

    Attributes:
        lora: Arguments of `peft.LoraConfig`.
        seconds: Time of scoring and choosing.
        histograms: Fisher information by kind of tensor.
    """

    lora: dict[str, Any]
    seconds: float
    histograms: list[ScoreHistogram]

    def save(self, folder: Path) -> None:
        """Write it where a resumed run finds it."""
        folder.mkdir(parents=True, exist_ok=True)
        record = _Record(
            lora=self.lora, score_seconds=self.seconds, score_histograms=self.histograms
        )
        write_json(folder / _RECORD, record)

    @classmethod
    def load(cls, folder: Path) -> ChosenRanks | None:
        """Read what `save` wrote completely; None if there is nothing."""
        try:
            record = _Record.model_validate_json((folder / _RECORD).read_bytes())
        except (OSError, ValueError):
            return None
        return cls(record.lora, record.score_seconds, record.score_histograms)


def ranks_by_fisher(
    model: nn.Module,
    arm: Arm,
    config: ExperimentConfig,
    budget: int,
    train: Any,
    collate: Callable[[Any], Any],
) -> ChosenRanks:
    """Score a LoRA of one rank and choose a rank for each module.

    Args:
        model: The model with a LoRA of `lora.fish_rank`, before training. It is left as it was.
        arm: The arm.
        config: The experiment.
        budget: Parameters to train in total, head included.
        train: Tokenized training examples.
        collate: Makes a batch of some of them.
    """
    began = time.perf_counter()
    settings = settings_of(arm, config, "fisher", num_trainable=budget)
    scores = score_with_perturbed_b(
        model,
        calibration_set(settings, config, train, collate),
        estimator=settings.estimator,
        num_samples=settings.num_samples,
        seed=settings.seed,
        progress=False,
    )
    lora = choose_ranks(scores, budget)
    return ChosenRanks(lora, time.perf_counter() - began, score_histograms(scores))
