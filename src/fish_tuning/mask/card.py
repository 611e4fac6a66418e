"""The model card of a masked model: what is trained, how it was chosen, how to go on with it."""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from fish_tuning.atomic import write_atomically
from fish_tuning.mask.mask import BITS_FILE, JSON_FILE, FishMask

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
TAG = "fish-tuning"

_BEGIN, _END = f"<!-- {TAG}: begin -->", f"<!-- {TAG}: end -->"
_SECTION = re.compile(rf"\s*{_BEGIN}.*?{_END}\n?", re.DOTALL)


def write_card(folder: str | os.PathLike[str], mask: FishMask, *, is_adapter: bool = False) -> None:
    """Describe a mask in the model card of a folder, which is made if there is none.

    The library's tag joins those of the card; its section takes the place of an earlier one. All
    else stays. A card whose metadata cannot be read is left alone, with a warning: a model is
    worth saving without its description.

    Args:
        folder: Holds the model and `README.md`, its card.
        mask: The mask of the model.
        is_adapter: Whether the model is an adapter for PEFT; one that the folder holds already is
            found there.
    """
    path = Path(folder) / CARD_FILE
    try:
        card = ModelCard.load(path) if path.is_file() else ModelCard("---\n{}\n---\n")
    except (ValueError, yaml.YAMLError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning("%s says nothing of the mask: its metadata cannot be read: %s", path, reason)
        return
    data: Any = card.data
    tags = data.tags or []
    data.tags = tags if TAG in tags else [*tags, TAG]
    rest = _SECTION.sub("\n", card.text).rstrip()
    section = _section(mask, *_loading(path.parent, is_adapter))
    card.text = f"{rest}\n\n{_BEGIN}\n{section}\n{_END}\n"
    write_atomically(path, str(card).encode())


def _loading(folder: Path, is_adapter: bool) -> tuple[list[str], list[str]]:
    """Python that loads what the folder holds as `model`, from `source`: imports, and the rest."""
    config = folder / "adapter_config.json"
    if not (is_adapter or config.is_file()):
        return [], ["# model: loaded from source, as usual"]
    if is_adapter or "peft_type" in json.loads(config.read_text(encoding="utf-8")):
        load = "model = PeftModel.from_pretrained(base_model, source, is_trainable=True)"
        return ["from peft import PeftModel"], [load]
    load = "model.train_adapter(model.load_adapter(source))"
    return ["import adapters"], ["# model: the base model", "adapters.init(model)", load]


def _section(mask: FishMask, imports: list[str], loading: list[str]) -> str:
    whole = sum(bool(bits.all()) for bits in mask.values())
    lines = [
        "## FISH-Tuning",
        "",
        f"{mask.num_trainable:,} of {mask.num_entries:,} entries ({mask.density:.2%}) of "
        f"{len(mask)} tensors are trained, {whole} of the tensors whole. The others have the "
        "values that they had before training. Method: FISH-Tuning, [arXiv 2504.04050]"
        "(https://arxiv.org/abs/2504.04050).",
        "",
    ]
    settings = {name: value for name, value in mask.provenance.items() if value is not None}
    if settings:
        lines += ["How the entries were chosen:", "", "| setting | value |", "|---|---|"]
        lines += [f"| {name} | {_cell(value)} |" for name, value in settings.items()]
        lines.append("")
    lines += [
        f"The mask is in `{BITS_FILE}` and `{JSON_FILE}`; inference needs neither. To train on "
        "with it, where `source` is this folder or repository:",
        "",
        "```python",
        *imports,
        "from fish_tuning import FishMask, apply_mask",
        "",
        *loading,
        "apply_mask(model, FishMask.from_pretrained(source))",
        "```",
    ]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    """A value in a Markdown table, where a regular expression's | would end the cell."""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{text}`".replace("|", r"\|").replace("\n", " ")
