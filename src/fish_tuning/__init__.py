"""FISH-Tuning: score PEFT parameters by Fisher information and train exactly the k that matter."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fish_tuning.callback import FishTuningCallback
    from fish_tuning.config import FishConfig
    from fish_tuning.fish_model import get_fish_model
    from fish_tuning.from_trainer import mask_trainer
    from fish_tuning.mask import FishMask
    from fish_tuning.packing import load_packed, pack, save_as_peft_adapter, unpack
    from fish_tuning.scoring import (
        FishScores,
        calculate_fisher_information,
        compare_scores,
        score_with_perturbed_b,
    )
    from fish_tuning.selection import (
        create_mask_from_fisher,
        create_ranks_from_fisher,
        magnitude_scores,
        random_scores,
        reversed_scores,
    )
    from fish_tuning.sparse import apply_mask, get_mask, remove_mask
    from fish_tuning.trainer import FishTuningTrainer

__version__ = "0.1.0"

__all__ = [
    "FishConfig",
    "FishMask",
    "FishScores",
    "FishTuningCallback",
    "FishTuningTrainer",
    "apply_mask",
    "calculate_fisher_information",
    "compare_scores",
    "create_mask_from_fisher",
    "create_ranks_from_fisher",
    "get_fish_model",
    "get_mask",
    "load_packed",
    "magnitude_scores",
    "mask_trainer",
    "pack",
    "random_scores",
    "remove_mask",
    "reversed_scores",
    "save_as_peft_adapter",
    "score_with_perturbed_b",
    "unpack",
]

_HOMES = {
    "FishConfig": "config",
    "FishMask": "mask",
    "FishScores": "scoring",
    "FishTuningCallback": "callback",
    "FishTuningTrainer": "trainer",
    "apply_mask": "sparse",
    "calculate_fisher_information": "scoring",
    "compare_scores": "scoring",
    "create_mask_from_fisher": "selection",
    "create_ranks_from_fisher": "selection",
    "get_fish_model": "fish_model",
    "get_mask": "sparse",
    "load_packed": "packing",
    "magnitude_scores": "selection",
    "mask_trainer": "from_trainer",
    "pack": "packing",
    "random_scores": "selection",
    "remove_mask": "sparse",
    "reversed_scores": "selection",
    "save_as_peft_adapter": "packing",
    "score_with_perturbed_b": "scoring",
    "unpack": "packing",
}


def __getattr__(name: str) -> Any:
    # On first use: the command line imports this package, and --help must not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
