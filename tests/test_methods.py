"""Every PEFT method, and docs/methods.md, which says what becomes of it."""

import dataclasses
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from peft import LoraConfig
from peft.utils import PeftType

from tests.methods_table import METHODS, outcomes, page, rows_of, scores_in_double
from tests.models import assert_scores_close

PAGE = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
ROWS = rows_of(PAGE)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method(method, tmp_path):
    """Guards scores, masks, training, files and merging of an adapter whose tensors lie elsewhere
    than LoRA's, and a table that says something else than what happens."""
    if "-bit base" in method.name:
        pytest.importorskip("bitsandbytes")
    assert outcomes(method, tmp_path) == ROWS[method.name]


# Methods with some float32 parts whatever the model's type, or a loss beyond the likelihood.
NOT_IN_DOUBLE = {
    *("LoRA, `target_parameters`", "AdaMSS", "AdaMSS, `use_asa`"),
    *("AdaLoRA", "CPT", "Shadow", "Arrow", "LoRA, 4-bit base", "LoRA, 8-bit base"),
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize(
    "method", [m for m in METHODS if m.name not in NOT_IN_DOUBLE], ids=lambda method: method.name
)
def test_scores_in_double(method):
    """Guards the recomputed layers to the last digits, where float32 would hide a term."""
    assert_scores_close(*scores_in_double(method), rtol=1e-10)


def test_no_method_is_missing():
    """Guards against a method of the installed peft that nobody has tried."""
    assert {method.kind for method in METHODS if method.kind} == {kind.value for kind in PeftType}


def test_no_variant_of_lora_is_missing():
    """Guards against a variant or a start of the installed peft's LoRA that nobody has tried."""
    fields = {field.name: field for field in dataclasses.fields(LoraConfig)}
    variants = {name for name, field in fields.items() if field.metadata.get("is_lora_variant")}
    named = get_type_hints(LoraConfig)["init_lora_weights"]
    starts = {name for kind in get_args(named) for name in get_args(kind)}
    tried = [method.options for method in METHODS if method.kind == "LORA"]
    assert variants and variants <= {name for options in tried for name in options}
    untried = starts - {options.get("init_lora_weights") for options in tried}
    # Drawn otherwise, a faster PiSSA, and one that needs bitsandbytes.
    assert untried == {"gaussian", "pissa_niter_[number of iters]", "loftq"}


def test_the_page_is_made_of_its_rows():
    """Guards text typed into the page, rows of methods that are gone, and blank cells."""
    assert list(ROWS) == [method.name for method in METHODS]
    assert page(ROWS) == PAGE
    assert all(cell for row in ROWS.values() for cell in row.values())
