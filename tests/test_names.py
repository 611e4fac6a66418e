"""Names of parameters: layer, module, side of a LoRA pair."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fish_tuning.names import (
    Place,
    kind_of,
    layer_path,
    opposite_side,
    place_of,
    side_of,
    without_adapter,
)

WRAPPER = "base_model.model."
LAYER = WRAPPER + "bert.encoder.layer.3."
words = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True).filter(
    lambda word: word != "default" and not word.startswith(("lora_", "modules_to_save"))
)
paths = st.lists(words, min_size=1, max_size=4).map(".".join)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        (
            LAYER + "attention.self.query.lora_A.default.weight",
            Place(3, "attention.self.query", "A"),
        ),
        (LAYER + "query.lora_B.other", Place(3, "query", "B")),
        (LAYER + "query.lora_magnitude_vector.default.weight", Place(3, "query", "")),
        (LAYER + "query.ia3_l.default", Place(3, "query", "")),
        (LAYER + "query.weight", Place(3, "query", "")),
        (WRAPPER + "embeddings.lora_embedding_A.default", Place(None, "embeddings", "A")),
        (WRAPPER + "classifier.modules_to_save.default.weight", Place(None, "classifier", "")),
        (
            WRAPPER + "classifier.modules_to_save.default.dense.weight",
            Place(None, "classifier", ""),
        ),
        ("lora_A", Place(None, "lora_A", "A")),
        ("weight", Place(None, "weight", "")),
        ("layers.0.weight", Place(0, "", "")),
    ],
)
def test_places(name, place):
    """Guards tables and figures of masks: one row per layer, one column per module."""
    assert place_of(name) == place


@given(
    paths,
    st.integers(0, 99),
    paths,
    st.sampled_from(["A", "B", "embedding_A", "embedding_B"]),
    words,
    st.booleans(),
    st.booleans(),
)
def test_every_part_is_found(before, number, module, kind, adapter, wrapped, weight):
    """Guards names of any model: each part is found, whatever surrounds it."""
    name = f"{before}.{number}.{module}.lora_{kind}.{adapter}" + (".weight" if weight else "")
    full = WRAPPER + name if wrapped else name
    assert place_of(full) == Place(number, module, kind[-1])
    assert layer_path(full) == f"{before}.{number}"
    assert (side_of(full), kind_of(full)) == (kind[-1], kind)
    other = opposite_side(full)
    assert other != full
    assert opposite_side(other) == full
    assert place_of(other) == Place(number, module, {"A": "B", "B": "A"}[kind[-1]])


@given(paths, st.sampled_from(["", ".modules_to_save"]))
def test_names_as_they_are_saved(path, wrapper):
    """Guards the adapter's name alone being dropped: a module called default_x stays."""
    saved = list(without_adapter(f"{path}{wrapper}.default.weight"))
    assert ("default", f"{path}.weight") in saved
    assert "default" not in dict(without_adapter(f"{path}.default_x.weight"))


def test_an_adapter_named_like_a_layer():
    saved = without_adapter("layers.0.q.lora_A.0.weight")
    assert [name for adapter, name in saved if adapter == "0"] == [
        "layers.q.lora_A.0.weight",
        "layers.0.q.lora_A.weight",
    ]


@pytest.mark.parametrize(
    "name", ["weight", "a.lora_C.default", "a.lora_AB.x", "alora_A.default", ""]
)
def test_names_that_are_no_lora(name):
    """Guards against tensors that are only named a bit like a pair."""
    assert (side_of(name), kind_of(name)) == ("", "")
    with pytest.raises(ValueError, match="is neither side of a LoRA pair"):
        opposite_side(name)


def test_no_torch():
    """Guards commands that parse names before the slow imports."""
    code = "import sys, fish_tuning.names; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
