"""The schema of an experiment's YAML: its sections, and what holds across them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from pydantic import Field

from fish_tuning.experiments.config.adapters import LoraConfig, PeerConfig
from fish_tuning.experiments.config.dataset import DatasetConfig
from fish_tuning.experiments.config.model import ModelConfig
from fish_tuning.experiments.config.sections import Section
from fish_tuning.experiments.config.selection import FishTuningConfig
from fish_tuning.experiments.config.training import (
    BaseTrainingConfig,
    LearningRateSearch,
    TrainingConfig,
)
from fish_tuning.experiments.config.values import Seeds


class ExperimentConfig(Section):
    """An experiment: one model, one data set, several arms, several seeds."""

    model: ModelConfig = Field(description="The model that is fine-tuned.")
    dataset: DatasetConfig = Field(description="The data.")
    lora: LoraConfig = Field(default=LoraConfig(), description="The adapters.")
    training: TrainingConfig = Field(
        default=TrainingConfig(), description="What differs from base_training here."
    )
    fish_tuning: FishTuningConfig = Field(
        default=FishTuningConfig(), description="Arms, scoring and selection."
    )
    base_training: BaseTrainingConfig = Field(
        default=BaseTrainingConfig(), description="Training arguments shared by experiments."
    )
    seeds: Seeds = Field(default=[42], description="Every arm runs once with each of these seeds.")
    peers: list[PeerConfig] = Field(default=[], description="Other PEFT methods as further arms.")
    learning_rate_search: LearningRateSearch | None = Field(
        default=None,
        description="Choose every arm's learning rate first; by default all arms use that of the "
        "training arguments.",
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Two arms with the same name."""
        peers = [peer.label for peer in self.peers]
        variants = [variant.name for variant in self.fish_tuning.variants]
        labels = [*self.fish_tuning.methods_to_run, *variants, *peers]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            key = "peers" if twice[0] in peers else "fish_tuning"
            yield key, f"{twice[0]!r} names two arms; give one another name"

    @property
    def training_args(self) -> dict[str, Any]:
        """The training arguments of every arm."""
        return {**self.base_training.args, **self.training.args_override}

    def digest(self) -> str:
        """Hash everything that a single run depends on, apart from its arm, budget and seed.

        Adding seeds, arms, budgets or learning rates to a config, or moving its results, does not
        change the digest: finished runs stay valid.
        """
        shared = self.model_dump(
            mode="json",
            exclude={
                "seeds": True,
                "peers": True,
                "learning_rate_search": True,
                "training": {"output_dir"},
                "fish_tuning": {
                    "methods_to_run",
                    "variants",
                    "budgets",
                    "prune_to_ratio_of_baseline",
                },
            },
        )
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]
