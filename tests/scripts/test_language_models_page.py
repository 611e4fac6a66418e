"""The page of the language models: its tables are made from runs alone."""

import language_models_page as page
import pytest

from fish_tuning.experiments.report.results_csv import csv_table
from fish_tuning.experiments.results import Results, Run


def run(arm, seed, rate, loss, held_out=None):
    """A finished run of 57,600 values."""
    metrics = {"eval_loss": loss, "bleu": 30 + seed, "rouge_l": 40 + seed, page.OTHER_TEXT: 9.0}
    return Run(
        run_id=f"{arm}-{seed}-{rate}",
        arm=arm,
        ratio=None,
        seed=seed,
        learning_rate=rate,
        held_out=held_out,
        status="finished",
        config={},
        main_metric="eval_loss",
        trainable_params=57_600,
        peak_memory_bytes=3_000_000_000,
        adapter_bytes=250_000,
        metrics=metrics,
        started_at="2026-01-01T00:00:00+00:00",
        finished_at="2026-01-01T00:01:00+00:00",
    )


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Two sweeps that share an arm; the second has it with other numbers."""
    monkeypatch.setattr(page, "FOLDER", tmp_path)
    (tmp_path / "runs").mkdir()
    sweeps = {
        "e2e": [("FISH", 1.40), ("Original LoRA", 1.45)],
        "e2e_weights": [("Original LoRA", 9.0), ("SHiRA", 1.50)],
    }
    for name, arms in sweeps.items():
        runs = [run(arm, s, 0.04, loss + 0.01 * s) for arm, loss in arms for s in (1, 2)]
        search = [run(arm, 0, rate, loss, 160) for arm, loss in arms for rate in (0.02, 0.04)]
        results = Results(name=name, config={}, runs=runs, search=search)
        (tmp_path / "runs" / f"{name}.csv").write_text(csv_table([results]), encoding="utf-8")


def test_an_arm_of_two_sweeps_is_that_of_the_first(written):
    """Guards the page against mixing the runs of two sweeps, and against a missing third one."""
    table = page.tables()["arms 57,600"]
    assert [row[0] for row in table.rows] == ["FISH", "LoRA r=1, q and v", "SHiRA"]
    assert [row[3].split()[0] for row in table.rows] == ["1.415", "1.465", "1.515"]
    assert not page.tables()["arms 10,000"].rows


def test_differences_are_paired_with_fish(written):
    """Guards the sign and the baseline of the differences."""
    rows = {row[0]: row[1] for row in page.tables()["differences 57,600"].rows}
    assert rows.keys() == {"LoRA r=1, q and v", "SHiRA"}
    assert rows["SHiRA"].startswith("+0.100")


def test_rates_are_those_of_the_search(written):
    """Guards against final runs among those that choose the rate."""
    table = page.tables()["rates 57,600"]
    assert table.headers == ("arm", "0.02", "0.04")
    assert table.rows[:2] == (
        ("FISH", "1.400", "1.400"),
        ("LoRA r=1, q and v", "1.450", "1.450"),
    )
