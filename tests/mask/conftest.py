"""A mask of every kind of tensor."""

import pytest
import torch

from fish_tuning.mask import FishMask

PREFIX = "base_model.model."


@pytest.fixture
def mask():
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "bert.encoder.layer.0.query.lora_B.default.weight": (5, 3),
        "bert.encoder.layer.0.query.lora_A.default.weight": (3, 5),
        "bert.encoder.layer.11.query.lora_A.default.weight": (2, 4),
        "bert.norm.empty": (0, 3),
        "bert.norm.scalar": (),
    }
    tensors = {
        PREFIX + name: torch.rand(shape, generator=generator) < 0.4
        for name, shape in shapes.items()
    }
    tensors[PREFIX + "classifier.modules_to_save.default.weight"] = torch.ones(2, 6).bool()
    return FishMask(tensors, provenance={"scope": "global", "names_to_exclude": ("classifier",)})
