"""Everything that can be checked, and read, before torch is imported and anything is written."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fish_tuning.experiments.config.load import check_output_dir
from fish_tuning.experiments.config.lock import check_unlocked
from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.config.surroundings import check_hub_dataset, check_trackers
from fish_tuning.experiments.errors import ConfigError, MissingFileError
from fish_tuning.experiments.metrics.names import CAUSAL_LM
from fish_tuning.experiments.models.find import check_model, check_quantization

if TYPE_CHECKING:
    from fish_tuning.experiments.data.read import ExperimentData


_PACKAGES = {"bleu": "sacrebleu", "rouge_l": "rouge_score"}


@dataclass(frozen=True)
class CheckedExperiment:
    """An experiment that passed the preflight, with the data that was read on the way.

    Attributes:
        config: The experiment's config.
        data: The examples; None if they have not been read. To train, local files have been read;
            for a plan, whatever has to be read to learn the number of labels.
        data_problem: Which local file is missing, of those that a plan can do without.
    """

    config: ExperimentConfig
    data: ExperimentData | None
    data_problem: str = ""


def check_experiment(
    config: ExperimentConfig, *, to_train: bool = True, source: str | None = None
) -> CheckedExperiment:
    """Check an experiment, and read its data if the files are local.

    Args:
        config: The experiment.
        to_train: Whether to check also what only training needs: weights, an output folder,
            bitsandbytes, and data without mistakes. A plan needs data only to learn the number of
            labels.
        source: The config file, for messages.

    Raises:
        ConfigError: With every problem found. Data is read only if there is no other problem.
        ModuleNotFoundError: The packages of the extra `experiments` are not installed.
    """
    problems: list[str] = []
    if to_train:
        with _collected(problems):
            check_output_dir(config.training.output_dir)
            # Of several processes that train together, one holds the lock.
            if int(os.environ.get("RANK", 0)) == 0:
                check_unlocked(Path(config.training.output_dir))
        with _collected(problems):
            check_quantization(config.model)
        with _collected(problems):
            check_packages(config)
    with _collected(problems):
        check_training_args(config)
    with _collected(problems):
        check_trackers(config, installed=to_train)
    labels_known = config.dataset.known_num_labels is not None
    with _collected(problems):
        if to_train or not labels_known:
            check_hub_dataset(config.dataset)
    with _collected(problems):
        check_model(config.model, weights=to_train)
    if problems:
        raise ConfigError(problems, source if len(problems) > 1 else None)
    if config.dataset.path is None and (to_train or labels_known):
        return CheckedExperiment(config, None)

    from fish_tuning.experiments.data.read import read_data

    try:
        data = read_data(config)
    except MissingFileError as error:
        if to_train:
            raise
        if not labels_known:
            way_out = "or set dataset.num_labels to plan without the data"
            raise MissingFileError(f"{error}, {way_out}") from None
        return CheckedExperiment(config, None, str(error))
    check_held_out(config, len(data.train))
    return CheckedExperiment(config, data)


@contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        problems += error.problems


def check_packages(config: ExperimentConfig) -> None:
    """Check that the packages that only language models need are installed.

    Raises:
        ConfigError: One of them is not.
    """
    needed = ["trl"] if config.is_generative else []
    metrics = config.generation.metrics if config.generation else []
    needed += [_PACKAGES[metric] for metric in metrics if metric in _PACKAGES]
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"dataset.task: {CAUSAL_LM} needs {' and '.join(missing)}, not installed; run: "
            "pip install 'fish-tuning[llm]'"
        )


def check_held_out(config: ExperimentConfig, examples: int) -> None:
    """Check that the search for learning rates leaves examples to train on.

    Args:
        config: The experiment.
        examples: Number of training examples.

    Raises:
        ConfigError: It holds out all of them.
    """
    search = config.learning_rate_search
    if search is not None and search.held_out >= examples:
        raise ConfigError(
            f"learning_rate_search.held_out: {search.held_out:,} of {examples:,} training "
            f"examples leave none to train on; hold out fewer, such as {max(1, examples // 5):,}"
        )


def check_training_args(config: ExperimentConfig) -> None:
    """Find conflicting training arguments, which transformers itself finds only much later.

    Raises:
        ConfigError: Saving and evaluation differ, so that the best model could not be kept.
    """
    args = config.training_args
    strategies = {
        "eval_strategy": ("no", "steps", "epoch"),
        "save_strategy": ("no", "steps", "epoch", "best"),
        "logging_strategy": ("no", "steps", "epoch"),
    }
    problems = [
        f"{config.argument_path(name)}: {args[name]!r} is unknown; use one of {', '.join(allowed)}"
        for name, allowed in strategies.items()
        if args.get(name) is not None and args[name] not in allowed
    ]
    evaluation, saving = args.get("eval_strategy", "no"), args.get("save_strategy", "steps")
    if not problems and args.get("load_best_model_at_end") and saving != "best":
        interval = args.get("eval_steps") or args.get("logging_steps") or 500
        save_steps = args.get("save_steps", 500)
        remedy = "or set training.args_override.load_best_model_at_end: false"
        if evaluation != saving:
            problems.append(
                f"{config.argument_path('save_strategy')}: {saving!r} differs from eval_strategy "
                f"{evaluation!r} and load_best_model_at_end is true; set both alike, {remedy}"
            )
        elif saving == "steps" and min(interval, save_steps) >= 1 and save_steps % interval:
            problems.append(
                f"{config.argument_path('save_steps')}: {save_steps:g} is not a multiple of "
                f"eval_steps ({interval:g}) and load_best_model_at_end is true; make it one, "
                f"{remedy}"
            )
    if problems:
        raise ConfigError(problems)
