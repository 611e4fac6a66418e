"""The schema of an experiment's YAML: its sections, and what holds across them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from pydantic import Field

from fish_tuning.experiments.config.adapters import LoraConfig, PeerConfig
from fish_tuning.experiments.config.dataset import DatasetConfig
from fish_tuning.experiments.config.generation import (
    EvaluationSetConfig,
    GenerationConfig,
    SetName,
)
from fish_tuning.experiments.config.model import ModelConfig
from fish_tuning.experiments.config.sections import Section
from fish_tuning.experiments.config.selection import FishTuningConfig
from fish_tuning.experiments.config.training import (
    BaseTrainingConfig,
    LearningRateSearch,
    Rate,
    Rates,
    TrainingConfig,
)
from fish_tuning.experiments.config.training_args import sft_arguments
from fish_tuning.experiments.config.values import Seeds, Text
from fish_tuning.experiments.metrics.names import CAUSAL_LM, TEXT_METRICS


class ExperimentConfig(Section):
    """An experiment: one model, one data set, several arms, several seeds."""

    model: ModelConfig = Field(description="The model that is fine-tuned.")
    dataset: DatasetConfig = Field(description="The data.")
    evaluation_sets: dict[SetName, EvaluationSetConfig] = Field(
        default={},
        description="Language models: further texts by name, unrelated to the task, say. Loss and "
        "perplexity on each, before and after training, show what a model forgets.",
    )
    generation: GenerationConfig | None = Field(
        default=None,
        description="Language models: generate from the validation prompts before and after "
        "training, and measure the texts; by default nothing is generated.",
    )
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

    learning_rates: dict[Text, Rate | Rates] = Field(
        default={},
        description="Learning rates of single arms by name: one, such as an earlier search chose, "
        "and the search leaves the arm out; or a list, which the search tries in place of its "
        "values.",
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Two arms with the same name, rates of no arm, and keys that do not fit the task."""
        peers = [peer.label for peer in self.peers]
        variants = [variant.name for variant in self.fish_tuning.variants]
        labels = [*self.fish_tuning.methods_to_run, *variants, *peers]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            key = "peers" if twice[0] in peers else "fish_tuning"
            yield key, f"{twice[0]!r} names two arms; give one another name"
        yield from self._conflicts_of_own_weights()
        for name, rates in self.learning_rates.items():
            if name not in labels:
                yield f"learning_rates.{name}", f"is no arm; the arms are {', '.join(labels)}"
            elif isinstance(rates, list) and self.learning_rate_search is None:
                yield (
                    f"learning_rates.{name}",
                    "lists rates for a search; keep one of them, or add learning_rate_search",
                )
        if self.training_args.get("bf16") and self.training_args.get("fp16"):
            yield self.argument_path("fp16"), "is true beside bf16; keep one"
        if self.is_generative:
            yield from self._conflicts_of_generation()
        else:
            yield from self._conflicts_without_generation()

    def _conflicts_of_own_weights(self) -> Iterator[tuple[str, str]]:
        exact = self.model.precision == "float32" and self.model.quantization is None
        for position, variant in enumerate(self.fish_tuning.variants):
            if variant.own_weights is not None and not exact:
                yield (
                    f"fish_tuning.variants[{position}].own_weights",
                    "trains the model's own weights, which would round small updates away; set "
                    "model.precision: float32 and remove model.quantization, or remove the variant",
                )

    def _conflicts_of_generation(self) -> Iterator[tuple[str, str]]:
        metric = self.dataset.metric
        measured = self.generation.metrics if self.generation else []
        if metric in TEXT_METRICS and metric not in measured:
            yield "dataset.metric", f"{metric!r} is not measured; add it to generation.metrics"
        if self.generation is not None and self.dataset.text_column is not None:
            yield "generation", "needs prompts, and dataset.text_column is plain text; remove one"
        args = self.training_args
        if args.get("completion_only_loss") and args.get("assistant_only_loss"):
            yield (
                self.argument_path("assistant_only_loss"),
                "is true beside completion_only_loss; keep one",
            )

    def _conflicts_without_generation(self) -> Iterator[tuple[str, str]]:
        remedy = f"set dataset.task: {CAUSAL_LM}, or remove it"
        for key in ("generation", "evaluation_sets"):
            if getattr(self, key):
                yield key, f"is for language models; {remedy}"
        for name in self.training_args:
            if name in sft_arguments():
                path = self.argument_path(name)
                yield path, f"is an argument of trl.SFTConfig, for language models; {remedy}"

    def argument_path(self, name: str) -> str:
        """Where the config sets a training argument."""
        own = name in self.training.args_override
        return f"{'training.args_override' if own else 'base_training.args'}.{name}"

    @property
    def is_generative(self) -> bool:
        """Whether the model is a language model that continues text."""
        return self.dataset.task == CAUSAL_LM

    @property
    def max_length(self) -> int:
        """The length of the longest input, in tokens."""
        length: int = self.training_args.get("max_length") or self.training.max_seq_length
        return length

    @property
    def dense_names(self) -> list[str]:
        """Patterns of the tensors to train densely; language models have no new head."""
        if self.is_generative and "names_to_exclude" not in self.lora.model_fields_set:
            return []
        return self.lora.names_to_exclude

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
                "learning_rates": True,
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
