"""Read the data of an experiment, whatever its task is."""

from __future__ import annotations

from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.data.generative import GenerativeData, load_generative_data
from fish_tuning.experiments.data.load import TaskData, load_data

ExperimentData = TaskData | GenerativeData


def read_data(config: ExperimentConfig) -> ExperimentData:
    """Read the examples that an experiment trains and evaluates on.

    Raises:
        ConfigError: The data cannot be loaded or does not fit the config.
    """
    return load_generative_data(config) if config.is_generative else load_data(config.dataset)
