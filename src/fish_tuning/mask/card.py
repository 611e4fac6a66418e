"""The model card of a masked model: what is trained, how it was chosen, how to continue."""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from fish_tuning.atomic import write_atomically
from fish_tuning.mask.card_text import without_base, without_blanks
from fish_tuning.mask.files import BITS_FILE, JSON_FILE
from fish_tuning.mask.mask import FishMask

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
TAG = "fish-tuning"

_BEGIN, _END = f"<!-- {TAG}: begin -->", f"<!-- {TAG}: end -->"
_SECTION = re.compile(rf"\s*{_BEGIN}.*?{_END}\n?", re.DOTALL)


def write_card(
    folder: str | os.PathLike[str],
    mask: FishMask,
    *,
    adapter: str | None = None,
    in_transformers: bool = False,
) -> None:
    """Describe a mask in a folder's model card, which is created if it does not exist.

    The card gains the tag `fish-tuning` and a section of its own, which replaces the section of an
    earlier save. Left out are the parts of a template that nobody has filled in, and a base model
    that is a folder on this machine. Everything else stays as it is. If the metadata of an existing
    card cannot be read, the card is left alone and a warning is logged, so that the model is saved
    all the same.

    Args:
        folder: Holds the model and its card, `README.md`.
        mask: The mask of the model.
        adapter: The name of the PEFT adapter that the mask is of. Not needed for "default" if the
            folder already holds its `adapter_config.json`.
        in_transformers: Whether the adapter belongs to a model of transformers itself, which
            loads it with `load_adapter`, and not to a `PeftModel`.
    """
    path = Path(folder) / CARD_FILE
    try:
        card = ModelCard.load(path) if path.is_file() else ModelCard("---\n{}\n---\n")
    except (ValueError, yaml.YAMLError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning(
            "%s does not describe the mask: its metadata cannot be read: %s", path, reason
        )
        return
    data: Any = card.data
    tags = data.tags or []
    data.tags = tags if TAG in tags else [*tags, TAG]
    others = _SECTION.sub("\n", card.text).rstrip()
    if isinstance(base := data.base_model, str) and _is_local(base):
        others, data.tags = without_base(others, data.tags, base)
        data.base_model = None
    others = without_blanks(
        others, f"{'Model' if adapter is None else 'Adapter'} trained with FISH-Tuning"
    ).rstrip()
    section = _section(mask, *_loading_code(path.parent, adapter, in_transformers))
    card.text = f"{others}\n\n{_BEGIN}\n{section}\n{_END}\n"
    write_atomically(path, str(card).encode())


def _is_local(base_model: str) -> bool:
    """Whether a base model is a folder: it exists, or no hub id looks like it."""
    return Path(base_model).is_dir() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", base_model)


def _loading_code(
    folder: Path, adapter: str | None, in_transformers: bool
) -> tuple[list[str], list[str]]:
    """Return Python lines that load the folder's `model` from `source`: imports, statements."""
    config = folder / "adapter_config.json"
    named = f", adapter_name={adapter!r}" if adapter not in (None, "default") else ""
    if in_transformers:
        return [], [
            "# model: the base model, loaded as usual",
            f"model.load_adapter(source{named}, is_trainable=True)",
        ]
    if adapter is None and not config.is_file():
        return [], ["# model: loaded from source, as usual"]
    if adapter is not None or "peft_type" in json.loads(config.read_text(encoding="utf-8")):
        load = f"model = PeftModel.from_pretrained(base_model, source{named}, is_trainable=True)"
        return ["from peft import PeftModel"], [load]
    load = "model.train_adapter(model.load_adapter(source))"
    return ["import adapters"], ["# model: the base model", "adapters.init(model)", load]


def _section(mask: FishMask, imports: list[str], statements: list[str]) -> str:
    dense = sum(bool(bits.all()) for bits in mask.values())
    lines = [
        "## FISH-Tuning",
        "",
        f"{mask.num_trainable:,} of {mask.num_entries:,} entries ({mask.density:.2%}) of "
        f"{len(mask)} tensors are trained, {dense} of the tensors densely. All other entries "
        "have the values that they had before training. Method: FISH-Tuning, [arXiv 2504.04050]"
        "(https://arxiv.org/abs/2504.04050).",
        "",
        f"This is true of the weights whose checksums `{JSON_FILE}` lists.",
        "",
    ]
    settings = {name: value for name, value in mask.provenance.items() if value is not None}
    if settings:
        lines += ["How the entries were chosen:", "", "| setting | value |", "|---|---|"]
        lines += [f"| {name} | {_cell(value)} |" for name, value in settings.items()]
        lines.append("")
    lines += [
        f"The mask is in `{BITS_FILE}` and `{JSON_FILE}`, which inference does not need. To "
        "continue training with it, where `source` is this folder or repository:",
        "",
        "```python",
        *imports,
        "from fish_tuning import FishMask, apply_mask",
        "",
        *statements,
        "apply_mask(model, FishMask.from_pretrained(source))",
        "```",
    ]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    """Format a value for a Markdown table, where an unescaped | would end the cell."""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{text}`".replace("|", r"\|").replace("\n", " ")
