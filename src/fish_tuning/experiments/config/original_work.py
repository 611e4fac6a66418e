"""Settings of the original work's base config that have another place today."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)


def take_original_settings(raw: dict[str, Any]) -> None:
    """Put the original work's settings where they belong, in place, with a notice of each.

    Its base config has a section `fish_tuning` within `fish_tuning`, empty, and `report_to` below
    it, which is an argument of the Trainer.

    Args:
        raw: A config as it was read, before it is checked.
    """
    section = raw.get("fish_tuning")
    if not isinstance(section, dict):
        return
    if "fish_tuning" in section and not section["fish_tuning"]:
        del section["fish_tuning"]
        logger.warning("fish_tuning.fish_tuning: is empty; left out")
    if "report_to" not in section:
        return
    base = raw.get("base_training") or {}
    args = (base.get("args") or {}) if isinstance(base, dict) else None
    # A section of another kind is refused later, and so is this key then.
    if isinstance(args, dict):
        tracker = section.pop("report_to")
        raw["base_training"] = {**base, "args": {"report_to": tracker, **args}}
        logger.warning(
            "fish_tuning.report_to: is an argument of the Trainer; taken as "
            "base_training.args.report_to%s",
            ", which is given too and takes precedence" if "report_to" in args else "",
        )
