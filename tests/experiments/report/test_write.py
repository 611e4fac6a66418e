"""The files of a report."""

from fish_tuning.experiments.report.write import write_report
from fish_tuning.experiments.results import Results
from tests.experiments.sweep_sample import make_sweep


def test_same_results_same_bytes(tmp_path):
    """Guards against reports that differ between two writings, and files left half-written."""
    sweep = make_sweep(seeds=(1, 2), ratios=(1.0, 0.5))
    first = [path.read_bytes() for path in write_report(sweep, tmp_path / "a")]
    read_back = Results.model_validate_json(sweep.model_dump_json())
    paths = write_report([read_back], tmp_path / "b")
    assert [path.read_bytes() for path in paths] == first
    assert [path.name for path in paths] == ["results.csv", "report.md", "report.html"]
    assert sorted(path.parent for path in paths) == [tmp_path / "b"] * 3
    assert sorted((tmp_path / "b").iterdir()) == sorted(paths)
