"""What is measured of a run's model before and after training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from fish_tuning.experiments.metrics.names import TEXT_METRICS, metric_key
from fish_tuning.experiments.metrics.texts import text_metrics
from fish_tuning.experiments.results import GeneratedExample
from fish_tuning.experiments.runs import processes
from fish_tuning.experiments.runs.generative.generation import generate_texts, write_generations
from fish_tuning.experiments.runs.prepare import PreparedExperiment
from fish_tuning.experiments.runs.release import release_model


@dataclass(frozen=True)
class BeforeTraining:
    """What a language model does before it is trained.

    Attributes:
        metrics: Its loss and its metrics, on the validation data and the evaluation sets.
        text: What it generates from the first prompt; None without generation.
    """

    metrics: dict[str, float]
    text: str | None


def evaluate_before(trainer: Trainer, experiment: PreparedExperiment) -> BeforeTraining | None:
    """Evaluate a language model before its training; None for other tasks.

    It is done again when a run is resumed, with the same result.
    """
    if not experiment.config.is_generative:
        return None
    metrics = evaluate_all(trainer, experiment)
    text = None
    generation = experiment.config.generation
    if generation is not None and experiment.prompts:
        [text] = generate_texts(trainer, experiment.prompts[:1], generation)
    assert isinstance(trainer.model, nn.Module)
    release_model(trainer, trainer.model)
    return BeforeTraining(metrics, text)


def evaluate_all(trainer: Trainer, experiment: PreparedExperiment) -> dict[str, float]:
    """Evaluate on the validation data and on every further evaluation set."""
    metrics = named_metrics(trainer.evaluate(), experiment.data.metrics)
    for name, data in experiment.further.items():
        found: Mapping[str, Any] = trainer.evaluate(data, metric_key_prefix=name)
        for metric in ("loss", "perplexity"):
            metrics[f"{name}_{metric}"] = float(found[f"{name}_{metric}"])
    return metrics


def generate_after(
    trainer: Trainer, experiment: PreparedExperiment, before: BeforeTraining | None, folder: Path
) -> dict[str, Any]:
    """Generate from all prompts, keep the texts and measure them.

    Args:
        trainer: The Trainer of the trained model.
        experiment: The experiment.
        before: What the model did before.
        folder: The run's own folder.

    Returns:
        What the run's record says of it; nothing without generation.
    """
    config, prompts = experiment.config.generation, experiment.prompts
    if config is None or not prompts:
        return {}
    texts = generate_texts(trainer, prompts, config)
    if processes.is_main():
        write_generations(prompts, texts, folder)
    example = GeneratedExample(
        prompt=prompts[0].text,
        references=list(prompts[0].references),
        before=(before and before.text) or "",
        after=texts[0],
    )
    references = [prompt.references for prompt in prompts]
    return {
        "metrics": text_metrics(config.metrics, texts, references, config.answer_pattern),
        "example": example,
    }


def named_metrics(entry: Mapping[str, float], metrics: Sequence[str]) -> dict[str, float]:
    """The loss and the metrics of an evaluation, without transformers' prefix on the metrics."""
    values = {"eval_loss": entry["eval_loss"]}
    values |= {
        metric_key(name): entry[f"eval_{name}"] for name in metrics if name not in TEXT_METRICS
    }
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}
