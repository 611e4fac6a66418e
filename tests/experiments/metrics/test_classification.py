"""Metrics against formulas written out by hand."""

import logging
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import EvalPrediction

from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.metrics.classification import compute_metrics_for
from fish_tuning.experiments.metrics.names import KNOWN_METRICS, greater_is_better, metric_names
from fish_tuning.experiments.tasks import KNOWN_TASKS, known_task

CLASSIFICATION = ("accuracy", "f1", "matthews_correlation")


def evaluate(names, predictions, labels):
    return compute_metrics_for(names)(EvalPrediction(predictions, np.asarray(labels)))


def logits_for(predicted, classes=2):
    return np.eye(classes)[np.asarray(predicted)] - 0.5


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_binary_metrics_against_the_confusion_matrix(pairs):
    """Guards the definitions, class 1 as the positive one, and 0 where they are undefined."""
    labels, predicted = zip(*pairs, strict=True)
    tp, fp = pairs.count((1, 1)), pairs.count((0, 1))
    fn, tn = pairs.count((1, 0)), pairs.count((0, 0))
    margins = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    result = evaluate(CLASSIFICATION, logits_for(predicted), labels)
    assert result["accuracy"] == pytest.approx((tp + tn) / len(pairs))
    assert result["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn) if tp else 0)
    matthews = (tp * tn - fp * fn) / math.sqrt(margins) if margins else 0
    assert result["matthews_correlation"] == pytest.approx(matthews)


def test_macro_f1_over_three_classes():
    """Guards f1_macro: the mean over classes, not over examples."""
    labels, predicted = [0, 0, 1, 2], [0, 1, 1, 0]
    result = evaluate(("f1_macro",), logits_for(predicted, 3), labels)
    assert result["f1_macro"] == pytest.approx((0.5 + 2 / 3 + 0) / 3)


def test_regression_metrics():
    """Guards Pearson, Spearman (ties get mean ranks) and the mean squared error."""
    labels, predicted = [1.0, 2.0, 3.0, 5.0], [1.5, 1.5, 4.0, 9.0]
    result = evaluate(("pearson", "spearmanr", "mse"), np.array(predicted)[:, None], labels)
    dx = [x - 2.75 for x in labels]
    dy = [y - 4.0 for y in predicted]
    covariance = sum(a * b for a, b in zip(dx, dy, strict=True))
    spread = math.sqrt(sum(a * a for a in dx) * sum(b * b for b in dy))
    assert result["pearson"] == pytest.approx(covariance / spread)
    ranks_x, ranks_y = [-1.5, -0.5, 0.5, 1.5], [-1.0, -1.0, 0.5, 1.5]
    rank_covariance = sum(a * b for a, b in zip(ranks_x, ranks_y, strict=True))
    assert result["spearmanr"] == pytest.approx(rank_covariance / math.sqrt(5 * 4.5))
    assert result["mse"] == pytest.approx((0.25 + 0.25 + 1 + 16) / 4)


@pytest.mark.parametrize("constant", ["labels", "predicted"])
def test_correlation_of_a_constant_is_zero(constant, caplog):
    """Guards results against NaN, which no JSON and no mean survives."""
    values = {"labels": [1.0, 2.0, 3.0], "predicted": [3.0, 1.0, 2.0], constant: [0.3] * 3}
    with caplog.at_level(logging.INFO):
        result = evaluate(("pearson", "spearmanr"), np.array(values["predicted"]), values["labels"])
    assert result == {"pearson": 0.0, "spearmanr": 0.0}
    assert "pearson is undefined" in caplog.text


def test_logits_come_first_in_a_tuple():
    """Guards models that return hidden states beside their logits."""
    predictions = (logits_for([0, 1]), np.zeros((2, 3, 4)))
    assert evaluate(("accuracy",), predictions, [0, 1]) == {"accuracy": 1.0}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_diverged_training_is_an_error(value):
    """Guards against NaN logits counted as class 0."""
    with pytest.raises(ValueError, match=r"1 of 4 predictions are not finite: training diverged"):
        evaluate(("accuracy",), np.array([[0.0, value], [1.0, 0.0]]), [0, 1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CoLA", ("matthews_correlation", "accuracy")),
        ("SST-2", ("accuracy",)),
        ("mrpc", ("accuracy", "f1")),
        ("qqp", ("accuracy", "f1")),
        ("RTE", ("accuracy",)),
        ("somebody/my_data", ("accuracy",)),
    ],
)
def test_metrics_by_task_name(name, expected):
    """Guards the GLUE table and the spellings of its names."""
    names = metric_names("classification", 2, known=known_task([name]))
    assert names == expected


def test_metrics_of_regression():
    """Guards STS-B and regression in general, also under a classification task's name."""
    expected = ("pearson", "spearmanr", "mse")
    assert metric_names("regression", 1, known=known_task(["STS-B"])) == expected
    assert metric_names("regression", 1, known=known_task(["cola"])) == expected
    assert metric_names("regression", 1, chosen="mse") == ("mse", "pearson", "spearmanr")


def test_chosen_metric_is_the_main_one():
    """Guards that naming a metric moves it first and drops nothing."""
    known = known_task(["mrpc"])
    assert metric_names("classification", 2, "f1", known) == ("f1", "accuracy")
    assert metric_names("classification", 2, "f1_macro") == ("f1_macro", "accuracy")
    assert metric_names("classification", 3, known=known) == ("accuracy",)


@pytest.mark.parametrize(
    ("task", "labels", "metric", "message"),
    [
        ("regression", 1, "accuracy", "'accuracy' does not measure regression; use .*pearson"),
        ("classification", 2, "mse", "'mse' does not measure classification; use .*accuracy"),
        ("classification", 3, "f1", "'f1' is defined for 2 classes and the data has 3; use f1_mac"),
    ],
)
def test_metric_that_does_not_fit(task, labels, metric, message):
    """Guards against a metric computed on what it is not defined for."""
    with pytest.raises(ConfigError, match=r"dataset\.metric: " + message):
        metric_names(task, labels, metric)


def test_table_names_known_metrics():
    """Guards the task table against a metric that nothing computes."""
    for task in KNOWN_TASKS.values():
        assert set(task.metrics) <= set(KNOWN_METRICS)
    lower = [name for name in KNOWN_METRICS if not greater_is_better(name)]
    assert lower == ["mse", "loss", "perplexity"]
