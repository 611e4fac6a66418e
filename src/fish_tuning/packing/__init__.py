"""Small files: the k trained values, a bit mask, and how to rebuild the frozen entries."""

from fish_tuning.packing.read import load_packed, unpack
from fish_tuning.packing.write import PackReport, pack

__all__ = ["PackReport", "load_packed", "pack", "unpack"]
