"""Read YAML strictly, and lay one mapping over another."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fish_tuning.experiments.errors import ConfigError

_MOST_NODES = 100_000
"""Values of a file with its aliases written out: a few lines can stand for billions."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc, unused-ignore]
    """The safe loader with YAML 1.2's plain scalars, refusing a key given twice.

    YAML 1.1, PyYAML's default, reads `2e-5` as text and the label name `no` as false.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def compose_document(self) -> yaml.Node | None:
        root = super().compose_document()
        if root is not None and _written_out(root, {}) > _MOST_NODES:
            raise ValueError(f"with its aliases written out it has over {_MOST_NODES:,} values")
        return root

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return node


def _written_out(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Nodes at and below this one, each alias counted as all that it stands for."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in sizes:
        # Nothing later could walk through an alias to the node it stands in.
        sizes[id(node)] = -1
        below = node.value
        if isinstance(node, yaml.MappingNode):
            below = [part for pair in below for part in pair]
        sizes[id(node)] = 1 + sum(_written_out(part, sizes) for part in below)
    if sizes[id(node)] < 0:
        raise ValueError("Circular reference")
    return sizes[id(node)]


for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(  # type: ignore[no-untyped-call, unused-ignore]
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ConfigError: If it is missing, unreadable, no YAML, or holds something else.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; name a YAML file in it") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    content = parse_yaml(text, str(path))
    if content is None:
        raise ConfigError(f"{path}: is empty; it needs at least model.name and a dataset")
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: holds a {type(content).__name__}, not a mapping of keys such as 'model:'"
        )
    return content


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML text with the strict, safe loader.

    Raises:
        ConfigError: Naming `source` and the line, if the text is no plain YAML.
    """
    try:
        content = yaml.load(text, _Loader)
        # Refuses what nothing later could show: a date as a key, thousands of digits, half of a
        # surrogate pair.
        json.dumps(content, default=str, ensure_ascii=False).encode()
        return content
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{line}: {error.problem or error.context}") from None
    except RecursionError:
        raise ConfigError(f"{source}: is nested too deeply") from None
    # PyYAML's constructors raise whatever a tag on the wrong value (!!int "") makes them meet.
    except Exception as error:
        raise ConfigError(f"{source}: is no valid YAML: {error}") from None


def parse_override(text: str) -> dict[str, Any]:
    """Turn `a.b=value` into `{"a": {"b": value}}`, the value read as YAML.

    Raises:
        ConfigError: If there is no `=` or an empty key, or the value is no YAML.
    """
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {text}: write it as key.key=value, such as lora.fish_rank=16")
    content = parse_yaml(value, f"--set {text}")
    for key in reversed(keys):
        content = {key: content}
    return dict(content)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one mapping over another: mappings are merged, everything else is replaced.

    An empty section (`lora:` with nothing below) leaves the base's section as it is.
    """
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(below, value)
        elif not (isinstance(below, Mapping) and value is None):
            merged[key] = value
    return merged
