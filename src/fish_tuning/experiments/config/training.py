"""The sections `training`, `base_training` and `learning_rate_search`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from fish_tuning.experiments.config.sections import Section
from fish_tuning.experiments.config.training_args import DEFAULT_ARGS, check_args
from fish_tuning.experiments.config.values import Positive, Seeds, Text, distinct

TrainingArgs = Annotated[dict[str, Any], AfterValidator(check_args)]


class TrainingConfig(Section):
    """What differs from `base_training` in this experiment."""

    max_seq_length: Positive = Field(
        default=128,
        description="Longest input, in tokens. SFTConfig's max_length takes precedence.",
    )
    output_dir: Text = Field(
        default="results",
        description="Folder of the results, relative to the current one; by default results/ and "
        "the config file's name.",
    )
    args_override: TrainingArgs = Field(
        default={},
        description="transformers.TrainingArguments that override base_training.args; with "
        "dataset.task: causal_lm, also those of trl.SFTConfig, such as packing, padding_free, "
        "max_length, completion_only_loss and assistant_only_loss.",
    )


class BaseTrainingConfig(Section):
    """Training arguments shared by experiments."""

    args: TrainingArgs = Field(default=DEFAULT_ARGS, description="transformers.TrainingArguments.")


Rate = Annotated[float, Field(gt=0)]
Rates = Annotated[list[Rate], Field(min_length=2), AfterValidator(distinct)]


class LearningRateSearch(Section):
    """A learning rate for each arm and budget, chosen on examples held out of the training data."""

    values: Rates = Field(
        description="The learning rates to try. The one whose runs do best by "
        "metric_for_best_model, on average over the seeds, trains the runs that count; among "
        "equally good ones, the one with the lowest loss."
    )
    held_out: Positive = Field(
        default=1000,
        description="Training examples that the search evaluates on instead of training on them. "
        "The runs that count train on them too.",
    )
    seeds: Seeds = Field(
        default=[0], description="Every learning rate is tried once with each of these seeds."
    )
