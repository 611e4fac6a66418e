"""Ways to train a few parameters of a model, each a training step to be timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftConfig,
    ShiraConfig,
    SupertuningConfig,
    get_peft_model,
)
from peft.optimizers import create_lorafa_optimizer
from torch import Tensor, nn

from benchmarks.gradient_hooks import mask_gradients
from benchmarks.shapes import Batch, Shape, sentences, texts
from fish_tuning import FishConfig, apply_mask, get_fish_model

HEAD = "modules_to_save"
LORA_FA = "frozen_a"
"""Name of an adapter that LoRA-FA's optimizer trains."""
_BASE_WEIGHT = "base_layer.weight"


@dataclass
class Contender:
    """A model and the optimizer of what it trains."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, model: Any) -> Contender:
        """The model with AdamW over its trainable parameters; with PEFT's own for LoRA-FA."""
        config = getattr(model, "peft_config", {}).get(LORA_FA)
        if config is not None:
            return cls(model, create_lorafa_optimizer(model, config.r, config.lora_alpha, 1e-4))
        return cls(model, torch.optim.AdamW(trainable(model).values(), 1e-4))

    @property
    def num_trainable(self) -> int:
        """Number of values that the optimizer holds."""
        groups = self.optimizer.param_groups
        return sum(p.numel() for group in groups for p in group["params"] if p.requires_grad)

    def step(self, batch: Batch) -> None:
        """One step of training."""
        self.optimizer.zero_grad()
        self.model(**batch).loss.backward()
        self.optimizer.step()


Way = Callable[[str], nn.Module]
"""Builds the model of a contender on a device."""


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters of a model, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def lora(shape: Shape, rank: int, device: str, **config: Any) -> Any:
    """LoRA on the modules of a shape."""
    targets = [*shape.targets]
    config = {"task_type": shape.task, "r": rank, "target_modules": targets, **config}
    return get_peft_model(shape.build(device), LoraConfig(**config))


def fish(shape: Shape, rank: int, device: str, **config: Any) -> nn.Module:
    """Masked LoRA: Fisher information selects as many entries as LoRA of half the rank has."""
    if shape.task == "SEQ_CLS":
        return masked(lora(shape, rank, device), sentences(32, 32, device), **config)
    return masked(lora(shape, rank, device), texts(4, 4, 32, device), **config)


def masked(model: nn.Module, data: list[Batch], **config: Any) -> nn.Module:
    """A model of which half the entries of its adapter are selected on some data."""
    settings = FishConfig(
        num_trainable=half_of(model), num_samples=32, names_to_exclude=(HEAD,), **config
    )
    return get_fish_model(model, settings, data, progress=False)


def fish_upper_layers(shape: Shape, rank: int, device: str) -> nn.Module:
    """The same number of entries, all of them in the upper half of the layers."""
    model = lora(shape, rank, device)
    entries = [name for name in trainable(model) if HEAD not in name]
    lower = set(entries[: len(entries) // 2])
    mask = {name: torch.full(p.shape, name not in lower) for name, p in trainable(model).items()}
    return apply_mask(model, mask)


def hooked(shape: Shape, rank: int, device: str, mask: Mapping[str, Tensor]) -> nn.Module:
    """LoRA with hooks that multiply its gradients by a mask."""
    model: nn.Module = lora(shape, rank, device)
    mask_gradients(model, mask)
    return model


def half_of(model: nn.Module) -> int:
    """Half of the adapter's entries, and the head."""
    sizes = {name: p.numel() for name, p in trainable(model).items()}
    head = sum(size for name, size in sizes.items() if HEAD in name)
    return (sum(sizes.values()) - head) // 2 + head


def peers(shape: Shape, rank: int) -> dict[str, Way]:
    """PEFT's other methods at the number of trainable values of LoRA of this rank, or just below.

    DoRA also trains magnitudes, so its rank is one lower. LoRA-FA trains only B, so its is higher.
    """
    common: dict[str, Any] = {"task_type": shape.task, "target_modules": [*shape.targets]}
    dense = lora(shape, rank, "meta")
    shapes = [p.shape for name, p in dense.named_parameters() if _BASE_WEIGHT in name]
    weights = sum(size.numel() for size in shapes)
    entries = sum(p.numel() for name, p in trainable(dense).items() if HEAD not in name)
    configs = {
        f"DoRA r={rank - 1}": LoraConfig(r=rank - 1, use_dora=True, **common),
        f"AdaLoRA r={rank}": AdaLoraConfig(init_r=rank, target_r=rank, total_step=1000, **common),
        "SHiRA": ShiraConfig(r=rank, **common),
        "Super-Tuning": SupertuningConfig(sparsity=1 - entries / weights, **common),
    }
    ways: dict[str, Way] = {
        name: partial(_adapted, shape, config) for name, config in configs.items()
    }
    rank_fa = entries // sum(size[0] for size in shapes)
    return ways | {f"LoRA-FA r={rank_fa}": partial(lora_fa, shape, rank_fa)}


def lora_fa(shape: Shape, rank: int, device: str) -> nn.Module:
    """LoRA that trains B alone, by the optimizer that PEFT has for it (arXiv 2308.03303)."""
    config = LoraConfig(task_type=shape.task, r=rank, target_modules=[*shape.targets])
    return get_peft_model(shape.build(device), config, adapter_name=LORA_FA)


def _adapted(shape: Shape, config: PeftConfig, device: str) -> nn.Module:
    return get_peft_model(shape.build(device), config)
