"""The page of the language models: its tables are made from runs alone."""

from pathlib import Path

import language_models_page as page
import pytest
from study_runs import filled

from fish_tuning.experiments.config.load import load_config
from fish_tuning.experiments.report.results_csv import csv_table
from fish_tuning.experiments.results import Results, Run

CONFIGS = Path(__file__).parents[2] / "configs" / "studies" / "language_models"


def test_tables_are_those_of_the_runs():
    """Guards every number in the page's tables: made from the committed runs, not written."""
    text = (page.FOLDER / "README.md").read_text(encoding="utf-8")
    assert filled(text, page.tables()) == text
    assert text.count("<!-- table: ") == text.count("<!-- end -->") == len(page.tables())


@pytest.mark.parametrize("name", [*page.SWEEPS.values(), page.RULES, "gsm8k"])
def test_configs_are_whole(name):
    """Guards the configs: they load, and their search leaves seeds that count untouched."""
    config = load_config(CONFIGS / f"{name}.yaml", [])
    assert not set(config.learning_rate_search.seeds) & set(config.seeds)


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
        adapter_bytes=250_000,
        peak_memory_bytes=2_000_000_000,
        metrics=metrics,
        metrics_before={**metrics, "eval_loss": 2.5},
        train_seconds=150.0,
        started_at="2026-01-01T00:00:00+00:00",
        finished_at="2026-01-01T00:01:00+00:00",
    )


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Runs of two arms and their search."""
    monkeypatch.setattr(page, "FOLDER", tmp_path)
    (tmp_path / "runs").mkdir()
    arms = [("FISH", 1.40), ("Original LoRA", 1.45)]
    runs = [run(arm, s, 0.04, loss + 0.01 * s) for arm, loss in arms for s in (1, 2)]
    search = [run(arm, 0, rate, loss, 160) for arm, loss in arms for rate in (0.02, 0.04)]
    results = Results(name="e2e", config={}, runs=runs, search=search)
    (tmp_path / "runs" / "e2e.csv").write_text(csv_table([results]), encoding="utf-8")


def test_arms(written):
    """Guards the names, the means and the row of the model before training."""
    table = page.arms_table(page.arms("e2e"))
    assert [row[0] for row in table.rows] == ["before training", "FISH", "LoRA r=1, q and v"]
    assert [row[3].split()[0] for row in table.rows] == ["2.500", "1.415", "1.465"]


def test_differences_are_paired_with_fish(written):
    """Guards the sign and the baseline of the differences."""
    table = page.differences_table(page.arms("e2e"))
    assert [row[0] for row in table.rows] == ["LoRA r=1, q and v"]
    assert table.rows[0][1].startswith("+0.050")


def test_rates_are_those_of_the_search(written):
    """Guards against final runs among those that choose the rate."""
    table = page.rates_table(page.search_losses("e2e"))
    assert table.headers == ("arm", "0.02", "0.04")
    assert table.rows == (
        ("FISH", "1.400", "1.400"),
        ("LoRA r=1, q and v", "1.450", "1.450"),
    )
