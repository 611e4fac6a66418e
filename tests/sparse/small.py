"""A small model with LoRA, and random masks of its adapters."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

LORA: dict[str, Any] = {"target_modules": ["first"], "r": 4, "init_lora_weights": False}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def lora_mlp(seed: int = 0, **config: Any) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(Mlp(), LoraConfig(**{**LORA, **config})).eval()


def add_adapter(model: PeftModel, name: str, seed: int) -> None:
    torch.manual_seed(seed)
    model.add_adapter(name, LoraConfig(**LORA))


def random_mask(model: nn.Module, adapter: str = "default", seed: int = 0) -> dict[str, Tensor]:
    """Half of the entries of each tensor of an adapter."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(p.shape, generator=generator) < 0.5
        for name, p in model.named_parameters()
        if f".{adapter}." in name
    }


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, mask: dict[str, Tensor] | None = None, steps: int = 3) -> None:
    """Steps of AdamW; with a mask, on a dense model whose gradients are masked."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), 0.05, weight_decay=0)
    for step in range(steps):
        optimizer.zero_grad()
        model(inputs(step)).square().sum().backward()
        for name, p in parameters.items():
            if mask is not None and name in mask and p.grad is not None:
                p.grad *= mask[name]
        optimizer.step()


def adapter_tensors(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """What the model's state dict holds of an adapter."""
    return {n: t.clone() for n, t in model.state_dict().items() if f".{adapter}." in n}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
