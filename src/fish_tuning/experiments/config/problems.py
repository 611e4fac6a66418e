"""Describe what pydantic found wrong with a config, in terms of the YAML file."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fish_tuning.experiments.config.adapters import PeerConfig
from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.config.sections import FieldProblems, section_of
from fish_tuning.experiments.config.selection import VariantConfig
from fish_tuning.experiments.config.training_args import argument_types


def describe(error: ValidationError, raw: Mapping[str, Any]) -> list[str]:
    """Describe pydantic's errors, one line per key: the value, what is allowed, what to do."""
    texts: dict[str, list[str]] = {}
    hints: dict[str, str] = {}
    for details in error.errors(include_url=False):
        path, hint = _locate(details, raw)
        cause = (details.get("ctx") or {}).get("error")
        if isinstance(cause, FieldProblems):
            for name, text in cause.problems.items():
                texts.setdefault(f"{path}.{name}".lstrip("."), []).append(text)
        elif details["type"] == "extra_forbidden":
            texts.setdefault(path, []).append(_unknown_key(path))
        elif details["type"] == "missing":
            texts.setdefault(path, []).append("is required")
            hints[path] = hint
        else:
            # Each member of a union reports the same value; show it once.
            first = path not in texts
            value = f"{reprlib.repr(details['input'])} " if first else ""
            message = details["msg"].removeprefix("Value error, ").removeprefix("Input ")
            texts.setdefault(path, []).append(value + message)
            if cause is None:
                hints[path] = hint
    return [
        f"{path}: {' or '.join(found)}" + (f". {hints[path]}" if hints.get(path) else "")
        for path, found in texts.items()
    ]


def _locate(details: ErrorDetails, raw: Any) -> tuple[str, str]:
    """Return an error's dotted path in the YAML, and the description of its field.

    Pydantic's own location also names the members of unions, which are not in the YAML.
    """
    path, hint = "", ""
    schema: type[BaseModel] | None = ExperimentConfig
    *_, last = details["loc"] or ("",)
    for step in details["loc"]:
        inside = (isinstance(raw, Mapping) and step in raw) or (
            isinstance(raw, list) and isinstance(step, int) and step < len(raw)
        )
        if not inside and not (step == last and details["type"] == "missing"):
            continue
        raw = raw[step] if inside else None
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
        if schema is not None and isinstance(step, str) and step in schema.model_fields:
            field = schema.model_fields[step]
            hint = field.description or ""
            schema = section_of(field.annotation)
    return path.lstrip("."), hint


def _unknown_key(path: str) -> str:
    """Say that a key is unknown, which key was probably meant, and which keys there are."""
    parent, _, key = path.rpartition(".")
    known = _known_paths(ExperimentConfig)
    prefix = re.sub(r"\[\d+\]", "[]", f"{parent}." if parent else "")
    siblings = [p.removeprefix(prefix) for p in known if p.startswith(prefix)]
    siblings = [name for name in siblings if "." not in name]
    leaves = {name: f"training.args_override.{name}" for name in argument_types()}
    leaves |= {p.rpartition(".")[2]: p for p in known}
    here = difflib.get_close_matches(key, siblings, n=1)
    elsewhere = difflib.get_close_matches(key, leaves, n=1, cutoff=0.8)
    meant = None
    if here and key not in leaves:
        meant = f"{parent}.{here[0]}".lstrip(".")
    elif elsewhere:
        meant = leaves[elsewhere[0]]
    hint = f"; did you mean {meant!r}?" if meant else ""
    return f"unknown key{hint} (known: {', '.join(siblings)})"


def _known_paths(schema: type[BaseModel], prefix: str = "") -> list[str]:
    paths = []
    for name, field in schema.model_fields.items():
        paths.append(prefix + name)
        section = section_of(field.annotation)
        if section is not None:
            mark = "[]" if section in (PeerConfig, VariantConfig) else ""
            paths += _known_paths(section, f"{prefix}{name}{mark}.")
    return paths
