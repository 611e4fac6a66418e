"""Reading YAML strictly, and merging it."""

import pytest

from fish_tuning.experiments.config.load import (
    ConfigError,
    load_config,
)
from fish_tuning.experiments.config.yaml_file import parse_yaml
from tests.experiments.config.config_files import MINIMAL, written


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1E3", 1000.0),
        ("-.5", -0.5),
        ("no", "no"),
        ("[no, yes, on]", ["no", "yes", "on"]),
        ("true", True),
        ("017", "017"),
        ("1_000", 1000),
        ("2026-01-01", "2026-01-01"),
        ("1:30", "1:30"),
        ("", None),
        ("~", None),
        ("'5'", "5"),
    ],
)
def test_plain_scalars(text, value):
    """Guards against YAML 1.1: learning rates read as text, the label `no` read as false."""
    parsed = parse_yaml(text, "x")
    assert parsed == value
    assert type(parsed) is type(value)


def test_merge_key_and_anchors(tmp_path):
    """Guards that the duplicate-key check leaves YAML's merge key alone."""
    text = """
        model: &m {name: a}
        dataset: {name: installed_text}
        lora: &l {baseline_rank: 2, fish_rank: 4}
        peers:
          - {method: lora, name: x, config: &c {r: 1}}
          - {method: lora, name: y, config: {<<: *c, r: 2, lora_alpha: 3}}
        """
    config = load_config(written(tmp_path, text))
    assert [peer.config for peer in config.peers] == [{"r": 1}, {"r": 2, "lora_alpha": 3}]
    assert [(peer.method, peer.label) for peer in config.peers] == [("LORA", "x"), ("LORA", "y")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"- a\n- b\n", "holds a list, not a mapping"),
        (b"just text", "holds a str, not a mapping"),
        (b"a: [1\n", r"line 2: "),
        (b"seeds: [1]\nlora: {}\nseeds: [2]\n", r"line 3: the key 'seeds' is given twice"),
        (b"a: !!python/object/apply:os.system ['true']\n", r"line 1: could not determine a constr"),
        (b"a: \xff\xfe", "is not UTF-8"),
        (b"a: \x00", "is not valid YAML"),
        (b'a: "\\ud800"', "is not valid YAML: .* surrogates not allowed"),
        (b"? [1]\n: 2\n", "unhashable key"),
        (b"model: &a {name: x, config_overrides: *a}\n", "is not valid YAML: Circular reference"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, message):
    """Guards against a traceback, or code run, where a file is not a plain YAML mapping."""
    path = tmp_path / "e.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_missing_file_and_folder(tmp_path):
    """Guards the two commonest wrong paths."""
    with pytest.raises(ConfigError, match=r"nothing\.yaml: no such file"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="is a folder; name a YAML file"):
        load_config(tmp_path)


@pytest.mark.parametrize("override", ["lora.fish_rank", "=3", "lora..x=3", "lora.fish_rank=[1"])
def test_bad_overrides(tmp_path, override):
    """Guards the command line's `--set` against text that is no assignment."""
    with pytest.raises(ConfigError, match="--set "):
        load_config(written(tmp_path), [override])


def test_byte_order_mark(tmp_path):
    """Guards files saved by Windows editors."""
    path = tmp_path / "e.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_config(path).model.name == "roberta-base"
