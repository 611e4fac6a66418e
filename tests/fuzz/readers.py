"""Inputs for the readers of untrusted files, and what a reader may do with them.

A reader either raises its own error, which names the file, or returns something sound. Inputs are
sound files with bytes or values changed, and for YAML also text put together from its own pieces.
"""

import copy
import hashlib
import json
import math
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import strategies as st
from safetensors import safe_open

from fish_tuning import FishMask, FishScores
from fish_tuning.experiments.config.load import load_config
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.results import read_results, write_json
from fish_tuning.mask.files import BITS_FILE, JSON_FILE
from fish_tuning.packing import pack
from fish_tuning.packing.packed_file import FORMAT, PackedFile
from fish_tuning.packing.read import unpacked_files
from fish_tuning.scoring.scores import SCORES_FILE
from tests.experiments.sweep_sample import make_sweep

ROOT = Path(__file__).parents[2]

STRANGE: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 64, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 10**4000),
    *(0.5, -0.0, 1e308, math.inf, -math.inf, math.nan),
    *("", "a", "\x00", "\ud800", "\u0100", "é", "../x", "/etc/passwd", "nan", "1", "a" * 999),
    *([], [[]], {}, {"": {}}, [0], [1, 2], ["a"], {"a": 1}, [2**62, 2**62, 0], [1] * 70),
]
"""Values that some reader has not thought of."""


@st.composite
def damaged(draw: Any, content: bytes, tokens: bytes = b"") -> bytes:
    """Bytes flipped, cut out, put in, repeated, or taken from the tokens."""
    damage = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(damage) - 1)))
        kind = draw(st.sampled_from(["flip", "cut", "delete", "insert", "repeat", "token"]))
        length = draw(st.integers(1, 16))
        if kind == "flip" and damage:
            damage[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del damage[at:]
        elif kind == "delete":
            del damage[at : at + length]
        elif kind == "insert":
            damage[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "repeat":
            damage[at:at] = damage[at : at + length] * draw(st.sampled_from([1, 2, 100]))
        elif tokens:
            damage[at : at + 1] = bytes([draw(st.sampled_from(tokens))])
    return bytes(damage)


@st.composite
def altered(draw: Any, value: Any) -> Any:
    """A JSON value with some of its parts replaced, removed or doubled, at any depth."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        holder = value
        while True:
            keys = list(holder) if isinstance(holder, dict) else range(len(holder))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            inside = holder[key]
            if isinstance(inside, dict | list) and inside and draw(st.integers(0, 4)):
                holder = inside
                continue
            kind = draw(st.sampled_from(["replace", "replace", "remove", "add", "deepen"]))
            if kind == "replace":
                holder[key] = copy.deepcopy(draw(st.sampled_from(STRANGE)))
            elif kind == "remove":
                del holder[key]
            elif kind == "deepen":
                holder[key] = [holder[key]]
            elif isinstance(holder, dict):
                new = draw(st.sampled_from(["", "a", "\ud800", "1"]))
                holder[new] = copy.deepcopy(inside)
            else:
                holder.append(copy.deepcopy(inside))
            break
    return value


@st.composite
def json_bytes(draw: Any, value: Any) -> bytes:
    """A JSON file, its values or its bytes changed."""
    if draw(st.booleans()):
        return json.dumps(draw(altered(value)), indent=2).encode()
    return draw(damaged(json.dumps(value, indent=2).encode(), b'0129-.eE,:{}[]"\\\nNI'))


@dataclass(frozen=True)
class Fuzzer:
    """A reader: what it is given, and what is checked."""

    inputs: Callable[[], st.SearchStrategy[Any]]
    check: Callable[[Any], None]


# The mask: two files


@cache
def _mask_files() -> tuple[Any, bytes]:
    torch.manual_seed(0)
    shapes = {"a.lora_A.w": (3, 5), "a.lora_B.w": (5, 3), "scalar": (), "empty": (0, 2)}
    mask = FishMask({n: torch.rand(s) < 0.5 for n, s in shapes.items()}, provenance={"seed": 1})
    with tempfile.TemporaryDirectory() as folder:
        mask.save_pretrained(folder)
        record = json.loads((Path(folder) / JSON_FILE).read_bytes())
        return record, (Path(folder) / BITS_FILE).read_bytes()


@st.composite
def _masks(draw: Any) -> tuple[bytes, bytes]:
    record, bits = _mask_files()
    kind = draw(st.sampled_from(["record", "bits", "both", "signed"]))
    if kind == "record":
        return draw(json_bytes(record)), bits
    if kind == "bits":
        return json.dumps(record).encode(), draw(damaged(bits, b'0129,:{}[]"UFIB8'))
    if kind == "both":
        return draw(json_bytes(record)), draw(damaged(bits))
    # A record that fits bits of any kind: the hash, which anyone can compute, is no defence.
    dtype = draw(st.sampled_from([np.uint8, np.uint8, np.float32, np.uint64, np.bool_]))
    shape = draw(st.sampled_from([(7,), (0,), (1, 7), (), (300,)]))
    array = np.ones(shape, dtype)
    record = draw(altered(record))
    if isinstance(record, dict):
        record["sha256"] = hashlib.sha256(array.tobytes()).hexdigest()
    name = draw(st.sampled_from(["bits", "bits", "other"]))
    content = safetensors.numpy.save({name: array})
    # Types that the format has and torch or numpy may not.
    for new in (b"F8_E8M0", b"F4", b"F6_E2M3", b"C64"):
        if draw(st.integers(0, 9)) == 0:
            content = content.replace(b'"U8"', b'"%s"' % new).replace(b'"BOOL"', b'"%s"' % new)
    return json.dumps(record).encode(), content


def _check_mask(content: tuple[bytes, bytes]) -> None:
    try:
        mask = FishMask.from_bytes(*content)
    except ValueError as error:
        assert JSON_FILE in str(error) or BITS_FILE in str(error)
        return
    with tempfile.TemporaryDirectory() as folder:
        mask.save_pretrained(folder)
        again = FishMask.from_pretrained(folder)
    assert again == mask and mask.summary()
    assert mask.num_trainable == sum(int(bits.sum()) for bits in mask.values())


# Scores: one file


@cache
def _scores() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    torch.manual_seed(0)
    tensors = {"a.lora_A.w": torch.rand(3, 5), "scalar": torch.rand(()), "empty": torch.rand(0, 2)}
    with tempfile.TemporaryDirectory() as folder:
        FishScores(tensors, provenance={"seed": 1}).save_pretrained(folder)
        with safe_open(Path(folder) / SCORES_FILE, "pt") as file:
            return tensors, json.loads(file.metadata()["fish_scores"])


@st.composite
def _scores_files(draw: Any) -> bytes:
    tensors, record = _scores()
    text = json.dumps(draw(altered(record)) if draw(st.booleans()) else record)
    content = safetensors.torch.save(tensors, {"fish_scores": text})
    return draw(damaged(content, b'0129,:{}[]"F3264')) if draw(st.booleans()) else content


def _check_scores(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / SCORES_FILE).write_bytes(content)
        try:
            scores = FishScores.from_pretrained(folder)
        except ValueError as error:
            assert SCORES_FILE in str(error)
            return
    assert all(tensor.is_floating_point() for tensor in scores.values())


# results.json


@cache
def _results() -> Any:
    content = json.loads(make_sweep().model_dump_json())
    content["runs"] = content["runs"][:2]
    for run in content["runs"]:
        for name in ("curve", "train_curve", "mask_density", "score_histograms"):
            run[name] = run[name][:1]
    return content


def _check_results(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        path.write_bytes(content)
        try:
            results = read_results(path)
        except ConfigError as error:
            assert str(path) in str(error)
            return
        write_json(path, results)
        # As text: not a number is not equal to itself.
        assert read_results(path).model_dump_json() == results.model_dump_json()


# An experiment's YAML


@cache
def _configs() -> list[bytes]:
    paths = sorted((ROOT / "configs" / "experiments").glob("*.yaml"))
    return [path.read_bytes() for path in paths]


_PIECES = [
    *(
        "model:",
        "name:",
        "dataset:",
        "load_args:",
        "path:",
        "lora:",
        "training:",
        "seeds:",
        "peers:",
    ),
    *("fish_tuning:", "methods_to_run:", "args_override:", "config_overrides:", "base_training:"),
    *(
        "\n",
        "\n",
        "\n  ",
        "\n  ",
        "\n    ",
        " ",
        "- ",
        "? ",
        ": ",
        ", ",
        "[",
        "]",
        "{",
        "}",
        "---\n",
    ),
    *("&a ", "*a", "<<: *a", "<<: [*a, *a]", "!!int ", "!!bool ", "!!float ", "!!timestamp "),
    *(
        "!!binary ",
        "!!set ",
        "!!omap ",
        "!!pairs ",
        "!!null ",
        "!!merge ",
        "!!str ",
        "!!seq ",
        "! ",
    ),
    *("!!python/object/apply:os.system ", "!!python/name:os.system ", "!x ", "%YAML 1.1\n", "|\n"),
    *("x", "''", '"\\x00"', '"\\ud800"', "0x" + "f" * 20_000, "1" * 5000, "1e999", ".nan", ".inf"),
    *("1", "-1", "0.5", "true", "null", "~", "2001-01-01", "1:2", "_", "\t", "\r", "#", "@", "`"),
]


@st.composite
def _experiments(draw: Any) -> bytes:
    kind = draw(st.sampled_from(["pieces", "within", "bytes"]))
    if kind == "bytes":
        return draw(damaged(draw(st.sampled_from(_configs())), b"&*!:-[]{}'\"|>%@`\t\n 0"))
    pieces = "".join(draw(st.lists(st.sampled_from(_PIECES), min_size=1, max_size=24)))
    if kind == "within":
        lines = draw(st.sampled_from(_configs())).decode().splitlines(keepends=True)
        at = draw(st.integers(0, len(lines) - 1))
        key, colon, _ = lines[at].partition(":")
        lines[at] = f"{key}{colon} {pieces}\n"
        pieces = "".join(lines)
    return pieces.encode(errors="surrogatepass")


def _check_config(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "experiment.yaml"
        path.write_bytes(content)
        try:
            config = load_config(path)
        except ConfigError as error:
            assert str(path) in str(error)
            return
        assert config.model_dump_json()


# A packed file


@cache
def _packed() -> tuple[bytes, dict[str, Any], dict[str, torch.Tensor]]:
    """A packed file, its record, and the start that it was packed with."""
    torch.manual_seed(0)
    bits = {name: torch.rand(6, 4) < 0.4 for name in ("m.constant", "m.start", "m.stored")}
    tensors = {name: torch.randn(6, 4) for name in bits} | {"m.other": torch.randn(5).bfloat16()}
    tensors["m.constant"][~bits["m.constant"]] = 0
    start = {"m.start": tensors["m.start"].where(~bits["m.start"], torch.tensor(1.0))}
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "saved"
        FishMask(bits).save_pretrained(folder)
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
        (folder / "README.md").write_text("a model")
        pack(folder, Path(home) / "packed", start=start)
        content = (Path(home) / "packed").read_bytes()
    parts = safetensors.numpy.load(content)
    return content, json.loads(zlib.decompress(parts["record"].tobytes())), start


@st.composite
def _packed_files(draw: Any) -> bytes:
    content, record, _ = _packed()
    kind = draw(st.sampled_from(["bytes", "record", "record bytes", "header", "mask"]))
    if kind == "bytes":
        return draw(damaged(content, b'0129,:{}[]"'))
    parts = safetensors.numpy.load(content)
    record = copy.deepcopy(record)
    if kind == "header":
        header = json.loads(record["weights_header"])
        record["weights_header"] = json.dumps(draw(altered(header)))
    elif kind == "mask":
        mask = json.loads(record["texts"]["fish_mask.json"])
        record["texts"]["fish_mask.json"] = draw(json_bytes(mask)).decode("latin-1")
    elif kind == "record":
        record = draw(altered(record))
    text = json.dumps(record).encode()
    if kind == "record bytes":
        text = draw(damaged(text, b'0129-.,:{}[]"\\\n\x00az/'))
    parts["record"] = np.frombuffer(zlib.compress(text), np.uint8)
    digest = hashlib.sha256()
    for name in ("record", "values", "stored", "bits"):
        digest.update(f"{name}:{len(parts[name])}:".encode() + parts[name].tobytes())
    about = json.dumps({"format_version": 1, "sha256": digest.hexdigest()})
    return safetensors.numpy.save(parts, {FORMAT: about})


def _check_packed(content: bytes) -> None:
    path = Path("some/packed")
    try:
        packed = PackedFile.from_bytes(content, path)
        files = unpacked_files(packed, path, _packed()[2], None)
    except ValueError as error:
        assert str(path) in str(error)
        return
    weights = files[packed.record.weights_name]
    assert hashlib.sha256(weights).hexdigest() == packed.record.weights_sha256
    assert not any("/" in name or name.startswith(".") for name in files)


FUZZERS = {
    "mask": Fuzzer(_masks, _check_mask),
    "scores": Fuzzer(_scores_files, _check_scores),
    "results": Fuzzer(lambda: json_bytes(_results()), _check_results),
    "config": Fuzzer(_experiments, _check_config),
    "packed file": Fuzzer(_packed_files, _check_packed),
}
