"""Small files: packed adapters, and sparse adapters that PEFT loads by itself."""

from fish_tuning.packing.read import load_packed, unpack
from fish_tuning.packing.supertuning import save_as_peft_adapter
from fish_tuning.packing.write import PackReport, pack

__all__ = ["PackReport", "load_packed", "pack", "save_as_peft_adapter", "unpack"]
