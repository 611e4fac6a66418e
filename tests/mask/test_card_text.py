"""Model cards without what nobody has filled in."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from fish_tuning.mask.card import write_card
from fish_tuning.mask.card_text import without_blanks
from tests.mask.test_card import masked_bert, small_mask

TEMPLATE = ModelCard.from_template(ModelCardData()).text


def test_nothing_is_left_of_an_untouched_template():
    """Guards against pages of [More Information Needed]."""
    text = without_blanks(TEMPLATE + "\n### Framework versions\n\n- PEFT 1\n", "Ours")
    assert text == "# Ours\n\n### Framework versions\n\n- PEFT 1\n"


def test_what_was_filled_in_stays():
    """Guards the author's text, beside placeholders, and code that looks like headings."""
    license_line = "- **License:** [More Information Needed]"
    assert license_line in TEMPLATE
    filled = TEMPLATE.replace(license_line, "- **License:** mit")
    filled = filled.replace("### Training Data\n", "### Training Data\n\nFish.\n\n```\n# no\n```\n")
    text = without_blanks(filled, "Ours")
    lines = [line for line in text.splitlines() if line and not line.startswith("<!--")]
    assert lines == [
        "# Ours",
        "## Model Details",
        "### Model Description",
        "- **License:** mit",
        "## Training Details",
        "### Training Data",
        "Fish.",
        "```",
        "# no",
        "```",
    ]


def test_card_of_a_trainer():
    """Guards the placeholders that transformers' Trainer writes, and a card without any."""
    text = (
        "# x\n\nAbout it.\n\n## Model description\n\nMore information needed\n\n## Results\n\n1\n"
    )
    assert without_blanks(text, "Ours") == "# x\n\nAbout it.\n\n## Results\n\n1\n"
    plain = "# x\n\n## Empty\n\n## Other\n"
    assert without_blanks(plain, "Ours") == plain


@pytest.mark.parametrize(
    ("base", "stays"),
    [
        ("someone/a-model", True),
        ("bert-base-uncased", True),
        (str(Path("mine").absolute()), False),
        ("./mine", False),
        ("runs/1/mine", False),
        (".", False),
    ],
)
def test_a_base_model_on_this_machine_is_left_out(tmp_path, base, stays):
    """Guards a card that names a path that exists nowhere else, and one that the hub refuses."""
    sentence = f"A fine-tuned version of [{base}](https://huggingface.co/{base})."
    card = f"---\nbase_model: {base}\ntags:\n- base_model:adapter:{base}\n- ours\n---\n{sentence}\n"
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    write_card(tmp_path, small_mask())
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == (base if stays else None)
    assert (f"base_model:adapter:{base}" in card.data.tags) == stays
    assert ("a local model" in card.text) != stays


def test_a_saved_adapter(tmp_path):
    """Guards the card as it is saved, twice."""
    model = masked_bert()
    model.base_model.model.config._name_or_path = str(tmp_path)
    for _ in range(2):
        model.save_pretrained(tmp_path / "x")
        text = (tmp_path / "x" / "README.md").read_text(encoding="utf-8")
        assert "More Information" not in text and str(tmp_path) not in text
        assert text.count("# Adapter trained with FISH-Tuning") == 1
        assert "### Framework versions" in text
