"""Read YAML strictly, and merge mappings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fish_tuning.experiments.config.yaml_advice import advice
from fish_tuning.experiments.errors import ConfigError

_MAX_NODES = 100_000
"""Limit on a file's values once its aliases are expanded: a few lines can expand to billions."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc, unused-ignore]
    """The safe loader, with the plain scalars of YAML 1.2 and without duplicate keys.

    YAML 1.1, PyYAML's default, reads `2e-5` as text and the label name `no` as false.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def compose_document(self) -> yaml.Node | None:
        root = super().compose_document()
        if root is not None and _expanded_size(root, {}) > _MAX_NODES:
            raise ValueError(f"it has over {_MAX_NODES:,} values once its aliases are expanded")
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


def _expanded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Count the nodes at and below this one, with every alias expanded."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = -1  # Being counted: an alias back to it would be endless.
        children = node.value
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in children for child in pair]
        sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in children)
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
        ConfigError: The file is missing, unreadable or not YAML, or holds something else.
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
        ConfigError: The text is not plain YAML. The message names `source` and the line.
    """
    try:
        content = yaml.load(text, _Loader)
        # Refuses what could not be written to a record: a date as a key, an integer of thousands
        # of digits, half of a surrogate pair.
        json.dumps(content, default=str, ensure_ascii=False).encode()
        return content
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{line}: {advice(error, text)}") from None
    except RecursionError:
        raise ConfigError(f"{source}: is nested too deeply") from None
    # PyYAML's constructors raise all kinds of errors for a tag on the wrong value, as in !!int "".
    except Exception as error:
        raise ConfigError(f"{source}: is not valid YAML: {error}") from None


def parse_override(text: str) -> dict[str, Any]:
    """Parse `a.b=value` into `{"a": {"b": value}}`, with the value read as YAML.

    Raises:
        ConfigError: There is no `=`, a key is empty, or the value is not YAML.
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
    """Merge two mappings at every depth; other values of `over` replace those of `base`.

    An empty section (`lora:` with nothing below it) leaves the base's section as it is.
    """
    merged = dict(base)
    for key, value in over.items():
        if isinstance(section := merged.get(key), Mapping) and isinstance(value, Mapping):
            merged[key] = merge(section, value)
        elif not (isinstance(section, Mapping) and value is None):
            merged[key] = value
    return merged
