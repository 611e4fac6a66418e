"""The files that hold records."""

import json
import math

import pytest

from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.results import Results, read_results, read_run, write_json
from tests.experiments.sweep_sample import make_sweep


def test_results_come_back_as_written(tmp_path):
    """Guards against a value that JSON changes, one that is not a number among them."""
    results = make_sweep()
    diverged = results.runs[0].model_copy(update={"metrics": {"accuracy": math.inf}})
    results = results.model_copy(update={"runs": [diverged, *results.runs[1:]]})
    write_json(tmp_path / "results.json", results)
    assert read_results(tmp_path) == results
    write_json(tmp_path / "result.json", diverged)
    assert read_run(tmp_path / "result.json") == diverged


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ('{"format_version": 1, "runs": [', "is not complete JSON"),
        ("[" * 100_000, "is not complete JSON"),
        ('{"format_version": 2}', "has format_version 2"),
        ('{"format_version": 1, "name": "x", "config": {}, "runs": [{}]}', "runs.0"),
        ('["no", "object"]', "not a results file"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, message):
    """Guards against a traceback, or half a sweep, from a file that was cut short or is foreign."""
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as raised:
        read_results(path)
    assert str(path) in str(raised.value)


def test_writing_replaces_whole_files_only(tmp_path, monkeypatch):
    """Guards the earlier file against a write that fails midway."""
    results = make_sweep()
    write_json(tmp_path / "results.json", results)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_json(tmp_path / "results.json", Results(name="new", config={}, runs=[]))
    assert read_results(tmp_path) == results
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
