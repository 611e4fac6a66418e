"""The search for learning rates: every arm at its own, chosen on examples that do not count."""

import re

import pytest
from datasets import Dataset
from pydantic import ValidationError

from fish_tuning.experiments.arms import planned, searched
from fish_tuning.experiments.data.load import hold_out
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.plan import plan_experiment
from fish_tuning.experiments.report.pages import markdown_report
from fish_tuning.experiments.results import Run
from fish_tuning.experiments.runs.preflight import check_experiment
from fish_tuning.experiments.runs.search import chosen_learning_rates
from fish_tuning.experiments.runs.sweep import run_experiment
from tests.experiments.tiny_experiment import experiment

ARMS = {"fish_tuning": {"methods_to_run": ["Original LoRA", "LoRA-FISH"]}}
SEARCH = {"values": [1e-4, 3e-2], "held_out": 40, "seeds": [7, 8]}


@pytest.fixture(scope="module")
def sweep(files, tmp_path_factory):
    config = experiment(*files, tmp_path_factory.mktemp("out"), **ARMS, learning_rate_search=SEARCH)
    return config, run_experiment(config, name="e")


def run_of(value, accuracy, loss=1.0, arm="a", seed=0, **changes):
    fields = {
        "run_id": "x",
        "arm": arm,
        "ratio": None,
        "seed": seed,
        "status": "finished",
        "config": {},
        "learning_rate": value,
        "metrics": {"accuracy": accuracy, "eval_loss": loss},
        "started_at": "",
        "finished_at": "",
    }
    return Run(**{**fields, **changes})


@pytest.mark.parametrize(
    ("runs", "best"),
    [
        ([run_of(1e-3, 0.8), run_of(2e-3, 0.9)], 2e-3),
        # The mean over seeds decides, not the best single run.
        ([run_of(1e-3, 0.8), run_of(1e-3, 0.8), run_of(2e-3, 0.95), run_of(2e-3, 0.6)], 1e-3),
        ([run_of(1e-3, 0.8, 0.5), run_of(2e-3, 0.8, 0.4)], 2e-3),
        ([run_of(2e-3, 0.8), run_of(1e-3, 0.8)], 1e-3),
        ([run_of(1e-3, 0.5), run_of(2e-3, 0.9), run_of(2e-3, 0.9, metrics={})], 1e-3),
        ([run_of(1e-3, 0.5), run_of(2e-3, 0.9, float("nan"))], 1e-3),
    ],
)
def test_the_best_on_average_is_chosen(runs, best):
    """Guards the choice: means over seeds, the loss among equals, never a run that failed."""
    assert chosen_learning_rates(runs, "accuracy", True) == {("a", None): best}


def test_each_arm_has_its_own(caplog):
    """Guards arms and budgets against each other's rates, and one without any against a guess."""
    runs = [
        *(run_of(value, value, value) for value in (1e-3, 2e-3)),
        *(run_of(value, value, value, arm="b", ratio=0.5) for value in (1e-3, 2e-3)),
        run_of(1e-3, 0.9, arm="c", metrics={}, status="failed"),
    ]
    assert chosen_learning_rates(runs, "eval_loss", False) == {
        ("a", None): 1e-3,
        ("b", 0.5): 1e-3,
    }
    assert "c: no learning rate" in caplog.text


def test_a_sweep_searches_first(sweep):
    """Guards the protocol: every value with every seed, then the best one with the seeds."""
    config, results = sweep
    assert [run.run_id for run in results.search] == [arm.run_id for arm in searched(config)]
    tried = [(run.arm, run.learning_rate, run.seed) for run in results.search]
    assert tried == [
        (arm, value, seed)
        for seed in (7, 8)
        for arm in ("Original LoRA", "LoRA-FISH")
        for value in (1e-4, 3e-2)
    ]
    assert [(run.arm, run.seed, run.status) for run in results.runs] == [
        ("Original LoRA", 1, "finished"),
        ("LoRA-FISH", 1, "finished"),
    ]
    best = chosen_learning_rates(results.search, "accuracy", True)
    assert {(run.arm, None): run.learning_rate for run in results.runs} == {
        (arm, None): value for (arm, _), value in best.items()
    }
    assert plan_experiment(check_experiment(config)).num_runs == 8 + 2


def test_a_searched_run_is_that_of_its_learning_rate(sweep, files, tmp_path):
    """Guards what counts: the same run as a config gives that names the rate itself."""
    _, results = sweep
    for run in results.runs:
        plain = experiment(
            *files,
            tmp_path / run.run_id,
            fish_tuning={"methods_to_run": [run.arm]},
            training={"args_override": {"learning_rate": run.learning_rate}},
        )
        (other,) = run_experiment(plain, name="e").runs
        assert (other.metrics, other.train_curve) == (run.metrics, run.train_curve)
        assert other.learning_rate is None


def test_the_search_does_not_see_what_it_is_judged_by(sweep):
    """Guards against leaks: as many held-out examples as asked for, of each class its share."""
    data = Dataset.from_dict({"labels": [0, 0, 0, 1] * 25, "row": list(range(100))})
    rest, held_out = hold_out(data, "labels", 20, "classification")
    assert len(held_out) == 20 and sum(held_out["labels"]) == 5
    assert sorted([*rest["row"], *held_out["row"]]) == list(range(100))


def test_more_values_keep_the_runs_that_are_there(sweep, tmp_path):
    """Guards a grid that turned out too small: it is extended, not begun again."""
    config, results = sweep
    search = {**SEARCH, "values": [*SEARCH["values"], 1e-2]}
    more = config.model_copy(
        update={"learning_rate_search": type(config.learning_rate_search)(**search)}
    )
    before = {run.run_id for run in results.search}
    assert before < {arm.run_id for arm in searched(more)}
    assert len({arm.run_id for arm in searched(more)}) == 12
    chosen = {("Original LoRA", None): 3e-2}
    (final,) = planned(more, chosen)
    assert final.learning_rate == 3e-2 and "lr0.03" in final.run_id


def test_the_report_shows_what_was_tried(sweep):
    """Guards the reader's view: the chosen rate beside each arm, and what the others gave."""
    _, results = sweep
    text = markdown_report([results])
    assert "| Learning Rate |" in text
    assert "| Method | 0.0001 | 0.03 |" in text
    assert len(re.findall(r"0\.\d{4} \(chosen\)", text)) == 2


def test_what_a_search_refuses(files, tmp_path):
    """Guards against a search that cannot choose, before anything is trained or written."""
    for wrong, message in (
        ({"values": [1e-3]}, "at least 2"),
        ({"values": [1e-3, 1e-3]}, "more than once"),
        ({"values": [1e-3, 0.0]}, "greater than 0"),
    ):
        with pytest.raises(ValidationError, match=message):
            experiment(*files, tmp_path, learning_rate_search=wrong)
    config = experiment(*files, tmp_path / "out", learning_rate_search={**SEARCH, "held_out": 5000})
    with pytest.raises(ConfigError, match=r"learning_rate_search\.held_out: 5,000 of 108"):
        run_experiment(config, name="e")
    assert not (tmp_path / "out").exists()
