"""Small files: the k trained values, a bit mask, and how to rebuild the frozen entries."""

from fish_tuning.packing.folders import PackReport, load_packed, pack, unpack

__all__ = ["PackReport", "load_packed", "pack", "unpack"]
