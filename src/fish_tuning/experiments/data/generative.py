"""Load the examples of a language model, in TRL's standard forms."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from datasets import Dataset

from fish_tuning.experiments.config.generation import EvaluationSetConfig
from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.data.load import hold_out
from fish_tuning.experiments.data.prompts import prompts_and_completions
from fish_tuning.experiments.data.splits import (
    load_split,
    open_splits,
    subset,
    train_and_validation,
    usual_validation_split,
)
from fish_tuning.experiments.data.text_forms import (
    kind_of,
    refuse_examples_to_classify,
    standard_form,
)
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.metrics.names import CAUSAL_LM, Task, metric_names
from fish_tuning.experiments.metrics.texts import extract_answer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerativeData:
    """The examples of a language model, in the columns that `standard_form` makes.

    Attributes:
        train: Training examples.
        validation: Examples to evaluate on, and whose prompts texts are generated from.
        further: Evaluation sets by name.
        metrics: Names of the metrics to report, the main one first.
    """

    train: Dataset
    validation: Dataset
    further: Mapping[str, Dataset]
    metrics: tuple[str, ...]

    task: ClassVar[Task] = CAUSAL_LM
    num_labels: ClassVar[int] = 0
    label_names: ClassVar[tuple[str, ...]] = ()


def load_generative_data(config: ExperimentConfig, *, seed: int = 42) -> GenerativeData:
    """Load all examples of an experiment with a language model.

    Args:
        config: The experiment.
        seed: Chooses the held-out share and the subsets; it does not depend on a run's seed.

    Raises:
        ConfigError: Data cannot be loaded, does not have the form that the config gives it, or
            does not fit the loss or the metrics.
    """
    form = config.dataset
    splits = open_splits(form)
    train = load_split(splits, form.train_split, "train_split")
    refuse_examples_to_classify(train.column_names, form)
    train = standard_form(train, form.train_split, form)
    if form.validation is not None:
        train = subset(train, form.max_train_samples, seed)
        validation = _evaluation_set("dataset.validation", form.validation, seed)
    else:
        train, validation = train_and_validation(
            splits,
            form,
            train,
            prepare=lambda data, split: standard_form(data, split, form),
            divide=lambda data, size: hold_out(data, "", size, CAUSAL_LM, seed),
            seed=seed,
        )
    if kind_of(train) != kind_of(validation):
        raise ConfigError(
            f"dataset.validation_split: has {kind_of(validation)}, the training split "
            f"{kind_of(train)}; use the same columns in both"
        )
    _check_loss(config, train)
    if config.generation is not None:
        _check_generation(config, validation)
    logger.info("%s: %d training, %d validation", kind_of(train), len(train), len(validation))
    return GenerativeData(
        train=train,
        validation=validation,
        further={
            name: _evaluation_set(f"evaluation_sets.{name}", of, seed)
            for name, of in config.evaluation_sets.items()
        },
        metrics=metric_names(CAUSAL_LM, 0, form.metric),
    )


def _evaluation_set(path: str, config: EvaluationSetConfig, seed: int) -> Dataset:
    try:
        splits = open_splits(config)
        usual = usual_validation_split(splits) or ("test" if "test" in splits else "train")
        split = config.split or usual
        data = standard_form(load_split(splits, split, "split"), split, config)
    except ConfigError as error:
        problems = [f"{path}{problem.removeprefix('dataset')}" for problem in error.problems]
        raise ConfigError(problems) from None
    return subset(data, config.max_samples, seed)


def _check_loss(config: ExperimentConfig, train: Dataset) -> None:
    """Check that the data has the parts that the loss is to be computed on."""
    kind, args = kind_of(train), config.training_args
    if args.get("completion_only_loss") and kind != "prompt and completion":
        raise ConfigError(
            f"{config.argument_path('completion_only_loss')}: the data "
            f"is {kind}, without completions; remove it"
            + (", or set assistant_only_loss: true" if kind == "chat" else "")
        )
    chat = kind == "chat" or (kind != "text" and isinstance(train[0]["prompt"], list))
    if args.get("assistant_only_loss") and not chat:
        raise ConfigError(
            f"{config.argument_path('assistant_only_loss')}: the data is "
            f"{kind}, not chat; remove it, or set dataset.messages_column or apply_chat_template"
        )


def _check_generation(config: ExperimentConfig, validation: Dataset) -> None:
    """Check that there are prompts, and answers where an answer is to be compared."""
    assert config.generation is not None
    if kind_of(validation) == "text":
        raise ConfigError(
            "generation: needs prompts, and the data is plain text; remove this section, or name "
            "dataset.prompt_column and completion_column"
        )
    pattern = config.generation.answer_pattern
    if pattern is None:
        return
    for row, (_, text) in enumerate(prompts_and_completions(validation), start=1):
        if extract_answer(text, pattern) is None:
            raise ConfigError(
                f"generation.answer_pattern: {pattern!r} does not occur in the completion of "
                f"validation row {row}: {text[-60:]!r}; correct the pattern or the row"
            )
