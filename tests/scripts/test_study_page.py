"""The study's page: its tables are those of the runs that lie beside it."""

import re
from pathlib import Path

import pytest
import study_page as page
from study_runs import filled, values

from fish_tuning.experiments.config.load import load_config

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "docs" / "study"
CONFIGS = sorted(p for p in (ROOT / "configs" / "studies").glob("*.yaml") if "base" not in p.stem)


def test_tables_are_those_of_the_runs():
    """Guards every number on the page: made from the committed runs, not written."""
    text = (STUDY / "README.md").read_text(encoding="utf-8")
    assert filled(text, page.tables()) == text
    assert len(re.findall("<!-- table: ", text)) == len(re.findall("<!-- end -->", text)) == 13


def test_every_run_has_its_config():
    """Guards reproduction: each file of runs is named after the config that makes it."""
    names = {path.stem for path in CONFIGS}
    assert {path.stem for path in (STUDY / "runs").glob("*.csv")} <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_whole(path):
    """Guards the configs: they load, and their search leaves seeds that count untouched."""
    config = load_config(path, [])
    assert not set(config.learning_rate_search.seeds) & set(config.seeds)


def test_differences_are_paired_by_seed():
    """Guards the arithmetic of the page against the rows of the files."""
    for arm, baseline, difference in page.pooled_differences():
        means = []
        for task in page.TASKS:
            groups = page.labeled(page.runs_of(task))
            if arm in groups and baseline in groups:
                of_arm, of_baseline = (values(groups[name]) for name in (arm, baseline))
                pairs = [of_arm[seed] - of_baseline[seed] for seed in of_arm]
                means.append(sum(pairs) / len(pairs))
        assert difference.mean == pytest.approx(sum(means) / len(means))
