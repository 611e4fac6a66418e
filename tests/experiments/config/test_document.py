"""The documentation of the config file is generated, and up to date."""

from pathlib import Path

from fish_tuning.experiments.config.document import configuration_document
from fish_tuning.experiments.config.schema import ExperimentConfig

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_page_is_up_to_date():
    """Guards the page against a schema that has moved on."""
    assert PAGE.read_text(encoding="utf-8") == configuration_document(), (
        "run: python -m fish_tuning.experiments.config.document > docs/configuration.md"
    )


def test_every_key_is_described():
    """Guards against a key without a word about it, and one that the page leaves out."""
    text = configuration_document()
    for section in ExperimentConfig.model_fields.values():
        assert section.description
        for name, field in getattr(section.annotation, "model_fields", {}).items():
            assert field.description, name
            assert f"| `{name}` |" in text
            assert field.description.replace("|", "\\|") in text


def test_bounds_and_choices_are_said():
    """Guards the values that are allowed, which come from the annotations."""
    rows = {
        line.split("|")[1].strip(): line
        for line in configuration_document().splitlines()
        if line.startswith("| `")
    }
    assert "| number, above 0, at most 1 | `1.0` |" in rows["`prune_to_ratio_of_baseline`"]
    assert "| `global`, `per_tensor`, `balanced`, `features`, `adaptive` |" in rows["`scope`"]
    assert "| list: text or text | `null` |" in rows["`target_modules`"]
    assert "| text | required |" in rows["`method`"]
