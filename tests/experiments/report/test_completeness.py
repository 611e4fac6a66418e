"""Which runs of a sweep are missing or have failed."""

from fish_tuning.experiments.report.completeness import completeness
from fish_tuning.experiments.results import Results
from tests.experiments.sweep_sample import failed_run, make_run
from tests.experiments.tiny_experiment import experiment


def results_of(tmp_path, runs, search=(), **changes):
    fish = {"methods_to_run": ["Original LoRA", "LoRA-FISH"]}
    config = experiment(tmp_path, tmp_path, tmp_path, fish_tuning=fish, **changes)
    return Results(name="x", config=config.model_dump(mode="json"), runs=runs, search=list(search))


def test_missing_and_failed(tmp_path):
    """Guards the counts, and the names of the runs that are not there."""
    runs = [make_run("Original LoRA", 1), failed_run("LoRA-FISH", 1, ratio=1.0)]
    found = completeness(results_of(tmp_path, runs, seeds=[1, 2]))
    assert found.missing == ("Original LoRA, seed 2", "LoRA-FISH 1, seed 2")
    assert [run.run_id for run in found.failed] == ["LoRA-FISH-1"]
    assert found.sentence.startswith("Incomplete: of 4 runs, 1 failed and 2 have not run yet.")
    assert not found


def test_complete(tmp_path):
    """Guards against a banner over a sweep that lacks nothing."""
    runs = [make_run("Original LoRA", 1), make_run("LoRA-FISH", 1, 1.0)]
    found = completeness(results_of(tmp_path, runs))
    assert found and found.sentence == "" and found.total == 2


def test_search(tmp_path):
    """Guards runs of a search, and runs whose rate only the search will tell."""
    search = {"values": [0.1, 0.2], "held_out": 5, "seeds": [0]}
    tried = [make_run("Original LoRA", 0, learning_rate=0.1, held_out=5)]
    runs = [make_run("Original LoRA", 1, learning_rate=0.1)]
    found = completeness(results_of(tmp_path, runs, tried, learning_rate_search=search))
    assert found.missing == (
        "Original LoRA, seed 0, learning rate 0.2",
        "LoRA-FISH 1, seed 0, learning rate 0.1",
        "LoRA-FISH 1, seed 0, learning rate 0.2",
        "LoRA-FISH 1, seed 1",
    )


def test_unknown_configs_are_no_problem():
    """Guards results of other versions, whose configs cannot be read."""
    for config in ({}, {"seeds": [1], "something": "else"}):
        assert completeness(Results(name="x", config=config, runs=[make_run("LoRA-FISH", 1)]))
