"""The pages about the config file and the results are generated, and up to date."""

import pytest
from reference_pages import DOCS, configuration_page, results_page

from fish_tuning.experiments.config.schema import ExperimentConfig


@pytest.mark.parametrize(
    ("name", "page"), [("configuration.md", configuration_page), ("results.md", results_page)]
)
def test_page_is_up_to_date(name, page):
    """Guards the pages against models that have changed since."""
    committed = (DOCS / name).read_text(encoding="utf-8")
    assert committed == page(), "run: python scripts/reference_pages.py"


def test_fields_of_results_are_described():
    """Guards fields of records inside records, and the CSV's columns."""
    for field in ("`peak_memory_of`", "`log10_edges`", "`format_version`", "`metrics.NAME`"):
        assert field in results_page()


def test_every_key_is_described():
    """Guards against a key without a description, and one that is missing from the page."""
    text = configuration_page()
    for section in ExperimentConfig.model_fields.values():
        assert section.description
        for name, field in getattr(section.annotation, "model_fields", {}).items():
            assert field.description, name
            assert f"| `{name}` |" in text
            assert field.description.replace("|", "\\|") in text


def test_bounds_and_choices_are_given():
    """Guards the allowed values, which come from the annotations."""
    rows = {
        line.split("|")[1].strip(): line
        for line in configuration_page().splitlines()
        if line.startswith("| `")
    }
    assert "| number, above 0, at most 1 | `1.0` |" in rows["`prune_to_ratio_of_baseline`"]
    assert "| `global`, `per_tensor`, `balanced`, `features`, `adaptive` |" in rows["`scope`"]
    assert "| list: text or text | `null` |" in rows["`target_modules`"]
    assert "| text | required |" in rows["`method`"]
