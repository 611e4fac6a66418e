"""Public tasks: their text columns, number of labels and metrics."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class KnownTask:
    """A public task.

    Attributes:
        text_columns: One or two columns of text.
        num_labels: Number of classes; 1 for regression.
        metrics: The metrics to report, the main one first.
    """

    text_columns: tuple[str, ...]
    num_labels: int = 2
    metrics: tuple[str, ...] = ("accuracy",)


_PAIR = ("sentence1", "sentence2")

# Metrics as on the GLUE leaderboard (Wang et al. 2019, table 1).
KNOWN_TASKS = {
    "cola": KnownTask(("sentence",), metrics=("matthews_correlation", "accuracy")),
    "sst2": KnownTask(("sentence",)),
    "mrpc": KnownTask(_PAIR, metrics=("accuracy", "f1")),
    "stsb": KnownTask(_PAIR, num_labels=1, metrics=("pearson", "spearmanr", "mse")),
    "qqp": KnownTask(("question1", "question2"), metrics=("accuracy", "f1")),
    "mnli": KnownTask(("premise", "hypothesis"), num_labels=3),
    "qnli": KnownTask(("question", "sentence")),
    "rte": KnownTask(_PAIR),
    "wnli": KnownTask(_PAIR),
    "rottentomatoes": KnownTask(("text",)),
    "imdb": KnownTask(("text",)),
    "agnews": KnownTask(("text",), num_labels=4),
}


def known_task(names: Iterable[str | None]) -> KnownTask | None:
    """Return the first known task among some names, or None.

    Args:
        names: Any spellings, such as `"SST-2"`, `"nyu-mll/glue"` or `"rotten_tomatoes"`.
    """
    for name in names:
        key = re.sub(r"[^a-z0-9]", "", (name or "").lower().rsplit("/", 1)[-1])
        if key in KNOWN_TASKS:
            return KNOWN_TASKS[key]
    return None
