"""unpack and load_packed: exact bits, starts and seeds that do not fit, and targets."""

import json
import os
import shutil

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from fish_tuning import (
    FishMask,
    apply_mask,
    load_packed,
    pack,
    unpack,
)
from fish_tuning.packing import read
from tests.models import examples_for, pad, tiny_bert, tiny_gpt2
from tests.packing.saved_folders import (
    DTYPES,
    any_bits,
    contents,
    fine_tuned,
    listing,
    load_base,
    new_adapter,
    random_mask,
    write_folder,
)


def test_adapter_from_its_start(base, adapter, tmp_path):
    """Guards the start that is named: needed again, and told from another one."""
    new_adapter(load_base(base), seed=3).save_pretrained(tmp_path / "start")
    new_adapter(load_base(base), seed=4).save_pretrained(tmp_path / "other")
    file = tmp_path / "packed"
    report = pack(adapter, file, start=tmp_path / "start")
    assert report.entries["start"] > 0 and report.entries["stored"] == 0
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=r"packed was packed with a start .*--start"):
        unpack(file, tmp_path / "again")
    with pytest.raises(ValueError, match=r"the start that was named.*sha256"):
        unpack(file, tmp_path / "again", start=tmp_path / "other")
    with pytest.raises(ValueError, match=r"the start that was named.*lora_A.* is not in it"):
        unpack(file, tmp_path / "again", start=base)
    with pytest.raises(FileNotFoundError, match="holds no safetensors file"):
        unpack(file, tmp_path / "again", start=tmp_path)
    assert listing(tmp_path) == before
    unpack(file, tmp_path / "again", start=tmp_path / "start")
    assert contents(tmp_path / "again").items() <= contents(adapter).items()


def test_load_packed_adapter(base, adapter, tmp_path):
    """Guards against an adapter that loads as other numbers than its folder, or without its
    options."""
    pack(adapter, tmp_path / "packed", seed=3)
    models = load_base(base), load_base(base)
    shutil.rmtree(base)  # The model that is passed is enough.
    loaded = load_packed(models[0], tmp_path / "packed", is_trainable=True)
    expected = PeftModel.from_pretrained(models[1], adapter, is_trainable=True)
    assert type(loaded) is type(expected)
    a, b = dict(loaded.named_parameters()), dict(expected.named_parameters())
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)
    assert all(a[name].requires_grad == b[name].requires_grad for name in b)
    batch = pad(examples_for(expected, 3))
    assert torch.equal(loaded.eval()(**batch).logits, expected.eval()(**batch).logits)
    apply_mask(loaded, FishMask.from_pretrained(adapter))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_the_model_itself(base, tmp_path, dtype):
    """Guards FISH Mask: the frozen part is the checkpoint, whose names lack the head's prefix."""
    folder = fine_tuned(base, tmp_path / "model", dtype)
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    encoder = {name.removeprefix("bert."): t for name, t in tensors.items() if "bert." in name}
    safetensors.torch.save_file(encoder, checkpoint / "model.safetensors")

    report = pack(folder, tmp_path / "packed", start=checkpoint)
    assert report.entries["stored"] == 0
    unpack(tmp_path / "packed", tmp_path / "again", start=checkpoint)
    assert "config.json" in contents(tmp_path / "again")
    assert contents(tmp_path / "again").items() <= contents(folder).items()

    model = load_base(base, dtype=dtype)
    assert load_packed(model, tmp_path / "packed") is model
    expected = load_base(folder, dtype=dtype).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())


def test_tied_weights(tmp_path):
    """Guards against a tensor that files hold under one of its names, taken for one that is
    missing."""
    torch.manual_seed(0)
    model, before = tiny_gpt2(), tiny_gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    apply_mask(model, random_mask(model, 0.1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "model")
    report = pack(tmp_path / "model", tmp_path / "packed", start=before.state_dict())
    assert report.entries["stored"] == 0
    load_packed(before, tmp_path / "packed")
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.state_dict().items())


def test_load_packed_onto_another_model(base, tmp_path):
    """Guards against a model that is half overwritten before the mistake is noticed."""
    folder = fine_tuned(base, tmp_path / "model")
    pack(folder, tmp_path / "packed", start=base)
    bigger = tiny_bert(num_hidden_layers=4)
    before = {name: tensor.clone() for name, tensor in bigger.state_dict().items()}
    for other, start, match in (
        (bigger, base, r"weights of another model: \d+ tensors.*layer\.3"),
        (tiny_bert(num_hidden_layers=2), base, "weights of another model: .*layer.2"),
        (tiny_bert(num_hidden_layers=2), None, r"the start that was named.*layer\.2.* not in it"),
        (tiny_bert(num_hidden_layers=3, seed=1), None, "the start that was named.*sha256"),
    ):
        with pytest.raises(ValueError, match=match):
            load_packed(other, tmp_path / "packed", start=start)
    assert all(torch.equal(t, before[name]) for name, t in bigger.state_dict().items())
    with pytest.raises(TypeError, match="is_trainable: only an adapter"):
        load_packed(load_base(base), tmp_path / "packed", is_trainable=True)


@settings(max_examples=60, deadline=None)
@given(
    tensors=st.lists(
        st.tuples(
            st.lists(st.integers(0, 7), max_size=3),
            st.sampled_from(DTYPES),
            st.sampled_from([None, 0.0, 0.05, 0.5, 1.0]),
            st.sampled_from(["constant", "start", "rounded", "nothing"]),
        ),
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip_of_any_numbers(tmp_path_factory, tensors, seed):
    """Guards against shapes, types, densities and bit patterns that come back as something else."""
    folder = tmp_path_factory.mktemp("any")
    rng = np.random.default_rng(seed)
    saved, masks, start = {}, {"not in the file": torch.ones(3)}, {}
    for number, (shape, dtype, density, frozen) in enumerate(tensors):
        name = f"model.layer.{number}"
        tensor = any_bits(rng, shape, dtype)
        selected = torch.from_numpy(np.asarray(rng.random(shape) < (density or 0.0)))
        if density is not None or number == 0:
            masks[name] = selected
        before = tensor
        if frozen == "constant":
            before = any_bits(rng, (), dtype).expand(tensor.shape)
        elif frozen in ("start", "rounded"):
            before = any_bits(rng, shape, dtype)
            start[name if number % 2 else f"layer.{number}"] = (
                before.float() if frozen == "rounded" else before
            )
        saved[name] = torch.where(selected, tensor, before).contiguous()
    write_folder(folder / "saved", saved, FishMask(masks))
    report = pack(folder / "saved", folder / "packed", start=start)
    unpack(folder / "packed", folder / "again", start=start)
    assert contents(folder / "again") == contents(folder / "saved")
    assert sum(report.entries.values()) == sum(tensor.numel() for tensor in saved.values())
    assert report.entries["selected"] == sum(
        int(bits.sum()) for name, bits in masks.items() if name in saved
    )


def test_a_seed_that_draws_other_numbers(adapter, base, tmp_path, monkeypatch):
    """Guards against another torch or PEFT, or another base model, that rebuilds another
    adapter."""
    file = tmp_path / "packed"
    pack(adapter, file, seed=3)
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=r"seed 3 draws: .*torch \d.*here torch.*is not in it"):
        unpack(file, tmp_path / "again", base_model=tiny_bert(num_hidden_layers=2))
    wide = tiny_bert(num_hidden_layers=3, hidden_size=16)
    with pytest.raises(ValueError, match=r"lora_A.* of shape \(8, 12\) is not in it"):
        unpack(file, tmp_path / "again", base_model=wide)
    with pytest.raises(ValueError, match=r"base model 'nowhere/at all' .*--base"):
        unpack(file, tmp_path / "again", base_model="nowhere/at all")
    with pytest.raises(ValueError, match="not for a Linear"):
        unpack(file, tmp_path / "again", base_model=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="cannot be built on its base model"):
        unpack(file, tmp_path / "again", base_model=tiny_gpt2())
    draw = read.draw_start

    def other(*arguments):
        return {name: tensor + 2**-20 for name, tensor in draw(*arguments).items()}

    monkeypatch.setattr(read, "draw_start", other)
    with pytest.raises(ValueError, match=r"seed 3 draws: .* do not have the sha256 recorded"):
        unpack(file, tmp_path / "again")
    assert listing(tmp_path) == before


def test_a_base_model_with_code_of_its_own(adapter, tmp_path):
    """Guards against running what a name in a packed file leads to."""
    pack(adapter, tmp_path / "packed", seed=3)
    base = tmp_path / "harm"
    base.mkdir()
    settings = {"model_type": "harm", "auto_map": {"AutoConfig": "code.Harm"}}
    (base / "config.json").write_text(json.dumps(settings))
    (base / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match=r"cannot be loaded .*custom code"):
        unpack(tmp_path / "packed", tmp_path / "again", base_model=base)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "again").exists()


def test_existing_targets(small, tmp_path):
    """Guards files of the user's that would be overwritten or mixed with others."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(FileExistsError, match=f"{name} exists and is not an empty folder"):
            unpack(small / "packed", tmp_path / name, start=small / "start")
    with pytest.raises(FileExistsError, match="file exists: name a new file"):
        pack(small / "saved", tmp_path / "file", start=small / "start")
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    unpack(small / "packed", tmp_path / "empty", start=small / "start")
    assert contents(tmp_path / "empty") == contents(small / "saved")


def test_a_failed_unpack_leaves_nothing(small, tmp_path, monkeypatch):
    """Guards against half of a folder that looks like an adapter."""

    def fail(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        unpack(small / "packed", tmp_path / "again", start=small / "start")
    assert listing(tmp_path) == []
