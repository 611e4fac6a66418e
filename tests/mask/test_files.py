"""The two files of a mask, and what is said about damaged ones."""

import json
import os

import pytest
import safetensors.torch
import torch

from fish_tuning.mask import FishMask
from fish_tuning.mask.files import BITS_FILE, JSON_FILE


@pytest.fixture
def folder(mask, tmp_path):
    mask.save_pretrained(tmp_path)
    return tmp_path


def edit(folder, **changes):
    path = folder / JSON_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def record(folder):
    return json.loads((folder / JSON_FILE).read_text())


def test_round_trip(mask, folder):
    """Guards against lost bits, shapes, order or provenance, and leftovers beside the two files."""
    loaded = FishMask.from_pretrained(folder)
    assert loaded == mask and list(loaded) == list(mask)
    assert loaded.provenance == mask.provenance
    assert sorted(os.listdir(folder)) == [JSON_FILE, BITS_FILE]
    mask.save_pretrained(folder / "a" / "b")
    assert FishMask.from_pretrained(str(folder / "a" / "b")) == mask


def test_files_as_documented(folder):
    """Guards the format that other programs read: first entry in the highest bit, byte-padded."""
    FishMask({"b": torch.arange(9) % 8 == 0, "a": torch.tensor([[0, 1]])}).save_pretrained(folder)
    tensors = safetensors.torch.load_file(folder / BITS_FILE)
    assert {name: bits.tolist() for name, bits in tensors.items()} == {"bits": [128, 128, 64]}
    saved = record(folder)
    assert saved["format_version"] == 1
    assert (saved["num_trainable"], saved["num_entries"]) == (3, 11)
    assert saved["tensors"] == [
        {"name": "b", "shape": [9], "num_selected": 2},
        {"name": "a", "shape": [1, 2], "num_selected": 1},
    ]


def test_size_on_disk(tmp_path):
    """Guards against a mask file that takes more than 1.05 bits per entry, BERT-base q/k/v at rank
    16."""
    shapes = [(16, 768), (768, 16)] * 36
    mask = FishMask({f"t{i}": torch.rand(shape) < 0.5 for i, shape in enumerate(shapes)})
    mask.save_pretrained(tmp_path)
    assert mask.num_entries == 884_736
    assert (tmp_path / BITS_FILE).stat().st_size * 8 <= 1.05 * mask.num_entries


def test_a_failed_save_keeps_the_earlier_mask(mask, folder, monkeypatch):
    """Guards against a half-written file in place of a good one, and temporary files left
    behind."""

    def fail(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        FishMask({"other": torch.ones(3)}).save_pretrained(folder)
    assert FishMask.from_pretrained(folder) == mask
    assert sorted(os.listdir(folder)) == [JSON_FILE, BITS_FILE]


def test_a_save_cut_between_the_files_is_noticed(mask, folder, monkeypatch):
    """Guards against new bits that are read under the old record of a mask of the same shapes."""
    replace = os.replace

    def cut(source, target):
        if str(target).endswith(JSON_FILE):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        FishMask({name: ~tensor for name, tensor in mask.items()}).save_pretrained(folder)
    with pytest.raises(ValueError, match="do not have the sha256"):
        FishMask.from_pretrained(folder)


@pytest.mark.parametrize("filename", [BITS_FILE, JSON_FILE])
def test_missing_file(folder, filename):
    """Guards against an error that does not say which of the two files is missing."""
    (folder / filename).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{filename} does not exist: .* FishMask\.save"):
        FishMask.from_pretrained(folder)


def test_damaged_bits(folder):
    """Guards against a flipped bit, a cut file, a file of something else."""
    path = folder / BITS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 0x80]))
    with pytest.raises(ValueError, match=rf"{BITS_FILE} cannot be used: .* sha256"):
        FishMask.from_pretrained(folder)
    for wrong in (whole[:-1], whole[:5], b"", b"pickle" * 9):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=rf"{BITS_FILE} .* not a complete safetensors file"):
            FishMask.from_pretrained(folder)


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"other": torch.zeros(9, dtype=torch.uint8)}, 'no flat uint8 tensor "bits"'),
        ({"bits": torch.zeros(9)}, 'no flat uint8 tensor "bits"'),
        ({"bits": torch.zeros(3, 3, dtype=torch.uint8)}, 'no flat uint8 tensor "bits"'),
        ({"bits": torch.zeros(9, dtype=torch.uint8)}, "holds 9 bytes of bits where .* lists 8"),
        ({"bits": torch.zeros(0, dtype=torch.uint8)}, "holds 0 bytes of bits where .* lists 8"),
    ],
)
def test_other_bits(folder, tensors, match):
    """Guards against a safetensors file that is sound, but is not this mask's."""
    safetensors.torch.save_file(tensors, folder / BITS_FILE)
    with pytest.raises(ValueError, match=rf"{BITS_FILE} cannot be used: .*{match}"):
        FishMask.from_pretrained(folder)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 10**5, b"9" * 10**4])
def test_not_json(folder, text):
    """Guards against JSON's own errors, which name no file."""
    (folder / JSON_FILE).write_bytes(text)
    with pytest.raises(ValueError, match=rf"{JSON_FILE} cannot be used: it is not JSON"):
        FishMask.from_pretrained(folder)


def test_json_of_another_kind(folder):
    """Guards against an AttributeError on a list."""
    (folder / JSON_FILE).write_text("[1]")
    with pytest.raises(ValueError, match="does not hold a JSON object"):
        FishMask.from_pretrained(folder)


@pytest.mark.parametrize("version", [2, None, "1"])
def test_other_version(folder, version):
    """Guards against a future format read as if it were this one."""
    edit(folder, format_version=version)
    with pytest.raises(ValueError, match=rf"{JSON_FILE} has format_version {version!r}"):
        FishMask.from_pretrained(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_trainable", "7"),
        ("num_trainable", None),
        ("num_entries", True),
        ("sha256", 7),
        ("provenance", []),
        ("tensors", {}),
    ],
)
def test_wrong_types(folder, key, value):
    """Guards against a TypeError from deep inside."""
    edit(folder, **{key: value})
    with pytest.raises(
        ValueError,
        match=rf"{JSON_FILE} .* it is wrong at {key}: Input should be a",
    ):
        FishMask.from_pretrained(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"name": 1},
        {"num_selected": 1.0},
        {"shape": "5,3"},
        {"shape": [5, -3]},
        {"shape": [5, True]},
        {"shape": [5.0, 3]},
        {"shape": [2**40, 2**40]},
        {"shape": [0, 2**62, 2**62]},
    ],
)
def test_wrong_tensor_entries(folder, change):
    """Guards against an entry that is no tensor, or one that torch cannot hold."""
    tensors = record(folder)["tensors"]
    tensors[1] |= change
    edit(folder, tensors=tensors)
    with pytest.raises(ValueError, match=rf"{JSON_FILE} .* it is wrong at tensors\.1\.\w+"):
        FishMask.from_pretrained(folder)


def test_tensor_entry_that_is_no_object(folder):
    """Guards against a string indexed by a string."""
    edit(folder, tensors=["a"])
    with pytest.raises(ValueError, match=r"it is wrong at tensors\.0: Input should be a"):
        FishMask.from_pretrained(folder)


def test_huge_shape_is_refused_before_it_is_allocated(folder):
    """Guards against a record that asks for more memory than there is."""
    tensors = record(folder)["tensors"]
    tensors[0]["shape"] = [2**31, 2**31]
    edit(folder, tensors=tensors)
    with pytest.raises(ValueError, match=r"holds 8 bytes of bits where .* lists 576,460,752,303"):
        FishMask.from_pretrained(folder)


def test_no_tensors(folder):
    """Guards against an empty record, which matches empty bits."""
    empty = torch.zeros(0, dtype=torch.uint8)
    safetensors.torch.save_file({"bits": empty}, folder / BITS_FILE)
    sha256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    edit(folder, tensors=[], sha256=sha256)
    with pytest.raises(ValueError, match=rf"{JSON_FILE} .* wrong at tensors: .* at least 1 item"):
        FishMask.from_pretrained(folder)


def test_counts_are_checked(folder):
    """Guards against a record whose counts are not those of the bits, or that lists a name
    twice."""
    tensors = record(folder)["tensors"]
    tensors[0]["num_selected"] += 1
    edit(folder, tensors=tensors)
    with pytest.raises(ValueError, match=rf"{JSON_FILE} .* but its num_selected is \d+"):
        FishMask.from_pretrained(folder)
    tensors[0]["num_selected"] -= 1
    tensors[1]["name"] = tensors[0]["name"]
    edit(folder, tensors=tensors)
    with pytest.raises(ValueError, match=rf'{JSON_FILE} .* "tensors" lists a name twice'):
        FishMask.from_pretrained(folder)


@pytest.mark.parametrize("key", ["num_trainable", "num_entries"])
def test_totals_are_checked(folder, key):
    """Guards against a total that was edited by hand."""
    edit(folder, **{key: 50})
    with pytest.raises(ValueError, match=rf"{JSON_FILE} .* {key} of its tensors is \d+, not 50"):
        FishMask.from_pretrained(folder)


def test_swapped_shapes(folder):
    """Guards against shapes that need as many bytes as there are, but other bits."""
    tensors = record(folder)["tensors"]
    tensors[0]["shape"], tensors[2]["shape"] = [4, 4], [2, 3]
    edit(folder, tensors=tensors)
    with pytest.raises(ValueError, match=rf"{JSON_FILE} cannot be used"):
        FishMask.from_pretrained(folder)


def test_from_the_hub(mask, folder, monkeypatch):
    """Guards the repository, file, revision and token that are asked of the hub."""
    asked = []

    def download(repo_id, filename, *, revision, token, local_files_only):
        asked.append((repo_id, filename, revision, token))
        return str(folder / filename)

    monkeypatch.setattr("fish_tuning.hub.ask_hub", lambda *args, **kwargs: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    loaded = FishMask.from_pretrained("someone/fish", revision="v1", token="secret")
    assert loaded == mask
    assert sorted(asked) == [
        ("someone/fish", JSON_FILE, "v1", "secret"),
        ("someone/fish", BITS_FILE, "v1", "secret"),
    ]


@pytest.mark.parametrize("error", [OSError("offline"), ValueError("bad repo id")])
def test_neither_a_folder_nor_on_the_hub(monkeypatch, error):
    """Guards against the hub's errors shown to someone who mistyped a folder."""

    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr("fish_tuning.hub.ask_hub", lambda *args, **kwargs: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(FileNotFoundError, match=rf"out/mask is not a local folder.*\({error}\)"):
        FishMask.from_pretrained("out/mask")
