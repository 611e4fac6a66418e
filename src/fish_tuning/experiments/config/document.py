"""The documentation of the config file, from the schema's own descriptions.

Run `python -m fish_tuning.experiments.config.document > docs/configuration.md` after a change.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any, get_origin

from pydantic import BaseModel

from fish_tuning.experiments.config.schema import ExperimentConfig

_INTRODUCTION = """\
# Configuration

This file is generated: `python -m fish_tuning.experiments.config.document > docs/configuration.md`.

One YAML file describes one experiment. This one is complete, everything else has a default:

```yaml
model:
  name: "roberta-base"
dataset:
  load_args: ["glue", "mrpc"]
lora:
  baseline_rank: 8
  fish_rank: 16
fish_tuning:
  prune_to_ratio_of_baseline: 0.5
```

- **Layers.** `base_config.yaml` in the file's folder or the one above is laid under the file, and
  `--set key.key=value` (the value in YAML) over both. Mappings are merged at every depth; lists and
  values are replaced. `training.args_override` wins over `base_training.args`.
- **Mistakes.** An unknown key is refused with the nearest known one, and all problems of a file are
  listed at once. A key given twice is an error. Plain scalars are those of YAML 1.2: `2e-5` is a
  number and `no` is text.
- **Training arguments** are those of the installed `transformers.TrainingArguments`. Three older
  names that the original work's files use (`evaluation_strategy`, `warmup_ratio`,
  `overwrite_output_dir`) are still understood, with a notice. `output_dir`, `seed` and the
  like are set for each run and refused here.
- **Reruns.** The same command skips finished runs. Adding seeds, arms, peers or budgets and moving
  `training.output_dir` keeps them; changing anything else makes them other runs.
"""


def configuration_document() -> str:
    """Return the text of `docs/configuration.md`."""
    root = ExperimentConfig.model_json_schema()
    blocks = [_INTRODUCTION]
    queue: list[tuple[str, type[BaseModel]]] = [("", ExperimentConfig)]
    for path, section in queue:
        schema = root if section is ExperimentConfig else root["$defs"][section.__name__]
        blocks.append(f"## {f'`{path}`' if path else 'Top level'}\n\n{_first_line(section)}\n")
        blocks.append("| key | value | default | meaning |\n|---|---|---|---|")
        for name, field in section.model_fields.items():
            below = _section_of(field.annotation)
            if below is not None:
                mark = "[]" if get_origin(field.annotation) is list else ""
                queue.append((f"{path}.{name}{mark}".lstrip("."), below))
                value = f"see `{queue[-1][0]}`"
            else:
                value = _value(schema["properties"][name])
            if field.is_required():
                default = "required"
            elif below is field.annotation:
                default = ""
            else:
                default = f"`{json.dumps(field.default)}`"
            cells = (f"`{name}`", value, default, field.description or "")
            blocks.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        blocks.append("")
    return "\n".join(blocks).rstrip() + "\n"


def _first_line(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip().splitlines()[0]


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds, or holds a list of."""
    for kind in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _value(schema: dict[str, Any]) -> str:
    """Say in words what a JSON schema allows."""
    if "anyOf" in schema:
        return " or ".join(_value(kind) for kind in schema["anyOf"] if kind != {"type": "null"})
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    match schema.get("type"):
        case "array":
            return f"list: {_value(schema['items'])}" if schema.get("items") else "list"
        case "object":
            below = schema.get("additionalProperties")
            return f"mapping to {_value(below)}" if isinstance(below, dict) and below else "mapping"
        case "boolean":
            return "`true`, `false`"
        case "integer" | "number" as kind:
            return ", ".join([kind, *_bounds(schema)])
        case "string":
            return "one character" if schema.get("maxLength") == 1 else "text"
    return "anything"


def _bounds(schema: dict[str, Any]) -> Iterator[str]:
    for key, words in {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }.items():
        if key in schema:
            yield f"{words} {schema[key]:g}" if schema[key] < 1e6 else f"{words} {schema[key]}"


if __name__ == "__main__":
    sys.stdout.write(configuration_document())
