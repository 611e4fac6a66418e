"""Saved adapters and models that several tests pack."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from fish_tuning import (
    FishMask,
    pack,
)
from tests.packing.saved_folders import (
    any_bits,
    base_folder,
    load_base,
    new_adapter,
    trained,
    write_folder,
)


@pytest.fixture
def base(tmp_path) -> Path:
    return base_folder(tmp_path / "base")


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    return trained(new_adapter(load_base(base)), tmp_path / "adapter")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A packed file in which every way to keep frozen entries is used, but for the seed."""
    folder = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    shapes = {"m.constant": (6, 5), "m.start": (7, 3), "m.stored": (4, 4), "m.whole": (3,)}
    tensors = {name: any_bits(rng, shape, torch.float32) for name, shape in shapes.items()}
    masks = {name: torch.from_numpy(rng.random(shape) < 0.4) for name, shape in shapes.items()}
    masks["m.whole"] = torch.ones(3)
    tensors["m.constant"] = tensors["m.constant"].where(masks["m.constant"], torch.tensor(-0.0))
    tensors["m.other"] = any_bits(rng, (5,), torch.bfloat16)
    write_folder(folder / "saved", tensors, FishMask(masks))
    start = {"start": tensors["m.start"].where(~masks["m.start"], torch.tensor(1.0))}
    (folder / "start").mkdir()
    safetensors.torch.save_file(start, folder / "start" / "model.safetensors")
    report = pack(folder / "saved", folder / "packed", start=folder / "start")
    assert all(report.entries[kind] for kind in ("selected", "constant", "start", "stored"))
    return folder
