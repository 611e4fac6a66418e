"""From a checked experiment to what all its runs share: tokenized examples, tokenizer, counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from fish_tuning.experiments import environment
from fish_tuning.experiments.arms import ArmKey
from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.data.generative import GenerativeData
from fish_tuning.experiments.data.load import hold_out, tokenize
from fish_tuning.experiments.data.prompts import Prompt, prompts_of
from fish_tuning.experiments.data.read import ExperimentData, read_data
from fish_tuning.experiments.data.tokens import LossOn, tokenize_texts
from fish_tuning.experiments.metrics.names import KNOWN_METRICS
from fish_tuning.experiments.models.counts import ParameterCounts, count_parameters
from fish_tuning.experiments.models.load import load_tokenizer, longest_input
from fish_tuning.experiments.runs.arguments import best_by, training_arguments
from fish_tuning.experiments.runs.preflight import CheckedExperiment, check_held_out


@dataclass(frozen=True)
class PreparedExperiment:
    """What all runs of an experiment share.

    Attributes:
        config: The experiment's config.
        data: The task, and its examples as text.
        train: Tokenized training examples.
        validation: Tokenized validation examples.
        tokenizer: The model's tokenizer.
        counts: Parameters of each arm at each budget.
        commit: Git commit of the working folder.
        further: Tokenized evaluation sets of a language model, by name.
        prompts: What a language model generates texts from.
        name: The experiment's name.
    """

    config: ExperimentConfig
    data: ExperimentData
    train: Dataset
    validation: Dataset
    tokenizer: PreTrainedTokenizerBase
    counts: Mapping[ArmKey, ParameterCounts]
    commit: str | None
    further: Mapping[str, Dataset] = field(default_factory=dict)
    prompts: Sequence[Prompt] = ()
    name: str = "experiment"

    def holding_out(self, size: int) -> PreparedExperiment:
        """The same experiment, evaluated on training examples that it does not train on."""
        train, held_out = hold_out(self.train, "labels", size, self.data.task)
        return replace(self, train=train, validation=held_out, further={}, prompts=())

    @property
    def collate(self) -> Callable[[Any], Any]:
        """Pads the examples of a batch to the longest of them."""
        if not self.config.is_generative:
            return DataCollatorWithPadding(self.tokenizer)
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        collator: Callable[[Any], Any] = DataCollatorForLanguageModeling(
            self.tokenizer.pad_token_id
        )
        return collator


def prepare(checked: CheckedExperiment, *, name: str = "experiment") -> PreparedExperiment:
    """Check the rest of an experiment, without loading weights, and make its examples ready.

    Args:
        checked: The experiment.
        name: Its name.

    Raises:
        ConfigError: Something in the config, the model or the data is wrong.
    """
    config = checked.config
    folder, seed = Path(config.training.output_dir), config.seeds[0]
    training_arguments(config, folder, seed, tuple(KNOWN_METRICS))
    tokenizer = load_tokenizer(config.model, config.max_length)
    data = checked.data
    num_labels = config.dataset.known_num_labels if data is None else data.num_labels
    # Before a download if possible: this finds a wrong budget or target module.
    counts = None if num_labels is None else count_parameters(config, num_labels)
    data = data or read_data(config)
    if counts is None or data.num_labels != num_labels:
        counts = count_parameters(config, data.num_labels)
    best_by(config, data.metrics)
    check_held_out(config, len(data.train))
    further: Mapping[str, Dataset] = {}
    prompts: Sequence[Prompt] = ()
    if isinstance(data, GenerativeData):
        train, validation, further = _tokenized(config, data, tokenizer)
        if config.generation is not None:
            longest = longest_input(config.model, tokenizer) - config.generation.max_new_tokens
            limit = config.generation.max_prompts
            prompts = prompts_of(data.validation, tokenizer, limit, longest)
    else:
        train, validation = tokenize(data, tokenizer, config.max_length)
    return PreparedExperiment(
        config=config,
        data=data,
        train=train,
        validation=validation,
        tokenizer=tokenizer,
        counts=counts,
        commit=environment.commit(),
        further=further,
        prompts=prompts,
        name=name,
    )


def _tokenized(
    config: ExperimentConfig, data: GenerativeData, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset, dict[str, Dataset]]:
    args, length = config.training_args, config.max_length
    loss = LossOn(args.get("completion_only_loss"), bool(args.get("assistant_only_loss")))
    train = tokenize_texts(data.train, tokenizer, length, loss, "the training split")
    validation = tokenize_texts(data.validation, tokenizer, length, loss, "the validation split")
    further = {
        name: tokenize_texts(rows, tokenizer, length, LossOn(), f"evaluation_sets.{name}")
        for name, rows in data.further.items()
    }
    return train, validation, further
