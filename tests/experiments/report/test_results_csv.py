"""The table of all runs as CSV."""

import csv
import io

from fish_tuning.experiments.report.results_csv import csv_table
from fish_tuning.experiments.results import Results
from tests.experiments.sweep_sample import failed_run, make_sweep

BERT = {"model": {"name": "bert-base-cased"}, "dataset": {"load_args": ["glue", "sst2"]}}


def test_csv_reads_back():
    """Guards against rows that lose a run, a value or its digits, and cells that a comma splits."""
    sweeps = [
        make_sweep(),
        Results(name="b, c", config=BERT, runs=[failed_run(error='a "b",\nc')]),
    ]
    rows = list(csv.DictReader(io.StringIO(csv_table(sweeps), newline="")))
    assert len(rows) == 13
    for row, run in zip(rows, sweeps[0].runs, strict=False):
        assert row["arm"] == run.arm
        assert float(row["metrics.accuracy"]) == run.metrics["accuracy"]
        assert float(row["train_seconds"]) == run.train_seconds
        assert int(row["trainable_params"]) == run.trainable_params
        assert row["ratio"] == ("" if run.ratio is None else str(run.ratio))
    assert rows[12]["experiment"] == "b, c"
    assert rows[12]["dataset"] == "glue/sst2"
    assert rows[12]["error"] == 'a "b",\nc'
    assert rows[12]["metrics.accuracy"] == ""
