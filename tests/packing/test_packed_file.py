"""Packed files that are damaged, forged or of another kind."""

import json
import shutil
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fish_tuning import (
    FishMask,
    unpack,
)
from fish_tuning.packing import packed_file
from fish_tuning.packing.packed_file import FORMAT
from tests.packing.saved_folders import (
    contents,
    deflated,
    listing,
    parts_of,
    signed,
)


def forged(small: Path, file: Path, edit) -> Path:
    """The small file with its record edited, and a sha256 that fits."""
    parts = parts_of(small / "packed")
    record = json.loads(zlib.decompress(parts["record"].tobytes()))
    edit(record, parts)
    parts["record"] = deflated(json.dumps(record).encode())
    file.write_bytes(signed(parts))
    return file


def test_format_as_documented(small, tmp_path):
    """Guards what other programs may read: the four parts and their order."""
    file = tmp_path / "packed"
    parts = parts_of(small / "packed")
    file.write_bytes(signed(parts))
    unpack(file, tmp_path / "again", start=small / "start")
    assert contents(tmp_path / "again") == contents(small / "saved")

    with safetensors.safe_open(small / "saved" / "model.safetensors", "pt") as saved:
        in_order = [(name, saved.get_tensor(name)) for name in saved.offset_keys()]
    mask = FishMask.from_pretrained(small / "saved")
    values = [tensor[mask[name]].numpy() for name, tensor in in_order if name in mask]
    assert parts["values"].tobytes() == b"".join(value.tobytes() for value in values)
    kept = [
        dict(in_order)["m.stored"][~mask["m.stored"]],
        dict(in_order)["m.other"].view(torch.int16),
    ]
    if list(dict(in_order)).index("m.other") < list(dict(in_order)).index("m.stored"):
        kept.reverse()
    assert parts["stored"].tobytes() == b"".join(tensor.numpy().tobytes() for tensor in kept)
    bits = parts_of(small / "saved" / "fish_mask.safetensors")["bits"]
    assert zlib.decompress(parts["bits"].tobytes()) == bits.tobytes()


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_files(small, tmp_path, data):
    """Guards against any other error, or any other folder, from bytes flipped, cut or added."""
    content = bytearray((small / "packed").read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "add"]))
    if kind == "flip":
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content += data.draw(st.binary(min_size=1, max_size=9))
    file, folder = tmp_path / "packed", tmp_path / "again"
    file.write_bytes(content)
    try:
        unpack(file, folder, start=small / "start")
    except ValueError as error:
        assert str(file) in str(error)
        assert listing(tmp_path) == [file]
    else:
        assert contents(folder) == contents(small / "saved")
        shutil.rmtree(folder)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_records_made_to_harm(small, tmp_path, data):
    """Guards against a record that is damaged, or wrong on purpose, under a sha256 that fits."""
    parts = parts_of(small / "packed")
    record = bytearray(zlib.decompress(parts["record"].tobytes()))
    for _ in range(data.draw(st.integers(1, 2))):
        position = data.draw(st.integers(0, len(record) - 1))
        record[position] = data.draw(st.sampled_from(b'0129-.,:{}[]"\\n\x00az/'))
    parts["record"] = deflated(bytes(record))
    file, folder = tmp_path / "packed", tmp_path / "again"
    file.write_bytes(signed(parts))
    try:
        unpack(file, folder, start=small / "start")
    except ValueError as error:
        assert str(file) in str(error)
        assert listing(tmp_path) == [file]
    else:
        name = "model.safetensors"
        assert (folder / name).read_bytes() == (small / "saved" / name).read_bytes()
        shutil.rmtree(folder)


def set_plan(**changes):
    def edit(record, parts):
        plans = [plan for plan in record["tensors"] if plan.get("mask") == "m.constant"]
        plans[0] |= changes

    return edit


def set_header(name: str, shape, size: int, gap: int = 0, frozen="constant"):
    """Claims one more tensor at the end of the weights."""

    def edit(record, parts):
        header = json.loads(record["weights_header"])
        last = max(entry["data_offsets"][1] for key, entry in header.items() if "_" not in key)
        offsets = [last + gap, last + gap + size]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        record["weights_header"] = json.dumps(header)
        record["tensors"].append({"mask": None, "frozen": frozen, "fill": 0, "rounded": None})

    return edit


def set_text(name: str):
    def edit(record, parts):
        record["texts"][name] = "harm"

    return edit


def empty(part: str):
    def edit(record, parts):
        parts[part] = parts[part][:-4]

    return edit


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (set_text("../harm"), r"record is wrong at texts\.\.\./harm"),
        (set_text("/tmp/harm"), r"record is wrong at texts"),
        (set_text("training_args.bin"), r"record is wrong at texts"),
        (lambda record, parts: record.update(weights_name="../x"), "wrong at weights_name"),
        (lambda record, parts: record.update(more=1), "wrong at more"),
        (lambda record, parts: record["tensors"].pop(), "does not list the tensors"),
        (lambda record, parts: record["texts"].pop("fish_mask.json"), "do not fit together"),
        (lambda record, parts: record.update(weights_sha256="0"), "sha256"),
        (set_header("z", [2**40], 2**42), "z cannot be filled with a constant"),
        (set_header("z", [2**60], 2**62, frozen="start"), r"z of shape .* is not in it"),
        (set_header("z", [2**70, 0], 0), "z has 0 frozen entries from constant"),
        (set_header("z", [3], 8), "offsets of z in its header are wrong"),
        (set_header("z", [3], 12, gap=4), "offsets of z in its header are wrong"),
        (set_header("z", [3], 12, gap=-4), "offsets of z in its header are wrong"),
        (set_plan(fill=2**32), "m.constant cannot be filled"),
        (set_plan(fill=-1), r"record is wrong at tensors\.\d+\.fill"),
        (set_plan(frozen="stored"), r"a part has \d+ bytes instead of \d+"),
        (set_plan(frozen=None), r"m.constant has \d+ frozen entries from None"),
        (set_plan(frozen="pickle"), r"record is wrong at tensors\.\d+\.frozen"),
        (set_plan(frozen="seed"), r"lacks a seed or adapter_config\.json"),
        (set_plan(mask="m.start"), "m.constant has shape"),
        (set_plan(mask="none"), "m.constant has shape"),
        (empty("values"), r"a part has \d+ bytes instead of \d+"),
        (empty("stored"), r"a part has \d+ bytes instead of \d+"),
        (empty("bits"), "does not inflate to at most"),
    ],
)
def test_forged_files(small, tmp_path, edit, match):
    """Guards each check behind the sha256, which anyone can compute; nothing is written."""
    file = forged(small, tmp_path / "packed", edit)
    with pytest.raises(ValueError, match=match) as caught:
        unpack(file, tmp_path / "again", start=small / "start")
    assert str(file) in str(caught.value)
    assert listing(tmp_path) == [file]


@pytest.mark.parametrize("part", ["record", "bits"])
def test_parts_that_inflate_without_end(small, tmp_path, monkeypatch, part):
    """Guards against memory that a few bytes ask for."""
    monkeypatch.setattr(packed_file, "RECORD_LIMIT", 2**20)
    parts = parts_of(small / "packed")
    parts[part] = deflated(bytes(2**26))
    (tmp_path / "packed").write_bytes(signed(parts))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"packed cannot be used: .*does not inflate to at most"):
        unpack(tmp_path / "packed", tmp_path / "again")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


@pytest.mark.parametrize("part", ["record", "values", "stored", "bits"])
def test_damage_is_told_from_another_start(small, tmp_path, part):
    """Guards advice to look for another start where the file is at fault."""
    content = (small / "packed").read_bytes()
    data = parts_of(small / "packed")[part].tobytes()
    position = content.index(data) + len(data) // 2
    flipped = content[position] ^ 0x10
    file = tmp_path / "packed"
    file.write_bytes(content[:position] + bytes([flipped]) + content[position + 1 :])
    with pytest.raises(ValueError, match=r"packed cannot be used: .* the sha256 that it records"):
        unpack(file, tmp_path / "again", start=small / "start")


def test_files_of_other_kinds(small, tmp_path):
    """Guards files that are sound and something else, of a later version, or not there."""
    file, folder = tmp_path / "packed", tmp_path / "again"
    for content in (
        (small / "saved" / "model.safetensors").read_bytes(),
        (small / "saved" / "fish_mask.safetensors").read_bytes(),
        safetensors.numpy.save({"a": np.zeros(3)}, {FORMAT: "[1]"}),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="packed cannot be used: it is not a file that fish"):
            unpack(file, folder)
    for content in (b"", b"\x80\x02pickle", b"PK\x03\x04" * 9):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"packed cannot be used: it is not a complete|header"):
            unpack(file, folder)
    for version in (2, None, "1"):
        file.write_bytes(signed(parts_of(small / "packed"), version))
        with pytest.raises(ValueError, match=f"packed has format_version {version!r}"):
            unpack(file, folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="packed does not exist: name a file"):
        unpack(file, folder)
    assert listing(tmp_path) == []
