"""A masked model's own weights -> sparse adapters that PEFT loads by itself."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fish_tuning.arguments import check_integer
from fish_tuning.atomic import write_new_folder_atomically
from fish_tuning.mask import FishMask
from fish_tuning.names import exactly
from fish_tuning.packing.start import Start, read_start
from fish_tuning.sparse import get_mask

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."
_ENOUGH = 1.1
"""A division into fewer adapters is good enough if it takes this many times the entries."""


@dataclass(frozen=True)
class _SparseLayer:
    """The selected entries of a linear layer: flat positions, and by how much they have changed."""

    name: str
    indices: Tensor
    changes: Tensor
    size: int

    @property
    def density(self) -> float:
        return len(self.indices) / self.size


def save_as_peft_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    start: Start,
    max_adapters: int = 4,
) -> list[Path]:
    """Save what a mask changed in a model's own weights as adapters that PEFT alone loads.

    The adapters are of PEFT's Super-Tuning (arXiv 2607.09287): positions and changes of single
    weights of `nn.Linear`. PEFT wants the same density in all layers of an adapter, so a layer with
    fewer entries is filled up with changes of 0. Layers of similar density therefore share an
    adapter. With `scope="per_tensor"` all layers have the same density and one adapter is enough.

    Modules that are trained in full, such as the head, are stored in full. So are those with
    selected entries that Super-Tuning cannot hold: biases, norms, embeddings. A warning names them;
    leave them out of the mask for small files.

    If one adapter is enough, it is `directory` itself. Otherwise its subfolders are the adapters,
    and they have to be loaded and active together:

        model = PeftModel.from_pretrained(base, folders[0], adapter_name="0")
        for number, folder in enumerate(folders[1:], 1):
            model.load_adapter(folder, adapter_name=str(number))
        model.base_model.set_adapter([str(number) for number in range(len(folders))])

    Args:
        model: A masked model without another adapter.
        directory: The folder to write. It must not exist, or be empty.
        start: The model before training: its folder, or its state dict.
        max_adapters: How many adapters there may be. More of them hold fewer zeros.

    Returns:
        The folders of the adapters.

    Raises:
        ValueError: The model has no mask, differs from the start outside of the mask, or has
            selected entries that no adapter can hold.
        FileExistsError: The folder is not empty.
        FileNotFoundError: The start has no weights.
        ImportError: The installed PEFT has no Super-Tuning.
    """
    check_integer("max_adapters", max_adapters, 1)
    mask = get_mask(model)
    if mask is None or hasattr(model, "peft_config"):
        raise ValueError(
            f"the model {'has no mask' if mask is None else 'has an adapter'}: only changes of a "
            "model's own weights under a mask are saved this way"
        )
    layers, full = _changes(model, mask, read_start(start))
    groups = _groups(layers, max_adapters)
    folders = [""] if len(groups) == 1 else [f"{number}/" for number in range(len(groups))]
    base = getattr(getattr(model, "config", None), "name_or_path", None) or None
    files: dict[str, bytes] = {}
    for folder, group in zip(folders, groups, strict=True):
        in_full = full if folder == folders[0] else {}
        for name, content in _adapter_files(group, in_full, base).items():
            files[folder + name] = content
    write_new_folder_atomically(Path(directory), files)
    return [Path(directory) / folder for folder in folders]


def _changes(
    model: nn.Module, mask: FishMask, start: Mapping[str, Tensor]
) -> tuple[list[_SparseLayer], dict[str, dict[str, Tensor]]]:
    """The changed linear layers, and the state dicts of the modules to store in full, by name."""
    now = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    layers: dict[str, _SparseLayer] = {}
    dense: list[_SparseLayer] = []
    changed: list[str] = []
    full: set[str] = set()
    in_part: list[str] = []
    for name, tensor in now.items():
        owner, before, bits = name.rpartition(".")[0], start.get(name), mask.get(name)
        if before is not None and torch.equal(before.cpu(), tensor):
            continue
        changed.append(owner)
        # A tensor that the start lacks, such as a new head, is stored whether it is trained or not.
        if before is None and (bits is None or bits.all()):
            full.add(owner)
            continue
        layer = _sparse_layer(name, tensor, before, bits)
        is_weight = isinstance(model.get_submodule(owner), nn.Linear) and name.endswith(".weight")
        # Beyond one half, positions and changes take more than the complete weight.
        if is_weight and layer.density <= 0.5:
            layers[owner] = layer
        else:
            full.add(owner)
            in_part += [name] * (layer.density < 1)
            dense += [layer] * is_weight
    # An adapter of PEFT holds at least one sparse layer; one whose bias has changed cannot be it.
    sparse = [layer for layer in dense if not layers and changed.count(layer.name) == 1]
    for layer in sorted(sparse, key=lambda layer: layer.density)[:1]:
        layers[layer.name] = layer
        full.remove(layer.name)
        in_part = [name for name in in_part if name != f"{layer.name}.weight"]
    full = _matched_by_peft(model, full)
    if in_part:
        size = sum(p.numel() for owner in full for p in model.get_submodule(owner).parameters())
        logger.warning(
            "%d tensors that are trained in part are stored in full with their modules (%s "
            "entries), because adapters of PEFT hold few single entries of linear weights only: %s",
            *(len(in_part), f"{size:,}", ", ".join(in_part[:5])),
        )
    states = {
        owner: {name: now[name] for name in now if name.rpartition(".")[0] == owner}
        for owner in sorted(full)
    }
    return [layer for owner, layer in layers.items() if owner not in full], states


def _sparse_layer(
    name: str, tensor: Tensor, before: Tensor | None, bits: Tensor | None
) -> _SparseLayer:
    """The selected entries of a tensor, and by how much they have changed."""
    if before is None or before.shape != tensor.shape:
        raise ValueError(
            f"the start has no tensor {name} of the shape {tuple(tensor.shape)}: give the model "
            "before training, or its state dict"
        )
    changes = tensor.double() - before.cpu().double()
    if bits is None or changes[~bits.cpu()].any():
        raise ValueError(
            f"{name} differs from the start outside of the mask: give the model as it was before "
            "training. A tensor that is tied to another cannot be saved this way"
        )
    indices = bits.cpu().reshape(-1).nonzero().reshape(-1)
    owner = name.rpartition(".")[0]
    return _SparseLayer(owner, indices, changes.reshape(-1)[indices].float(), tensor.numel())


def _matched_by_peft(model: nn.Module, full: set[str]) -> set[str]:
    """The modules that PEFT takes for `modules_to_save`: all whose names end with one of these."""
    matched = {name for name, _ in model.named_modules() if full and name.endswith(tuple(full))}
    for name in sorted(matched | full):
        if not name or next(model.get_submodule(name).children(), None) is not None:
            raise ValueError(
                f"{name or 'the model itself'} holds trained parameters of its own and other "
                "modules, which PEFT cannot store apart: leave its parameters out of the mask"
            )
    return matched


def _groups(layers: Sequence[_SparseLayer], most: int) -> list[list[_SparseLayer]]:
    """Divide layers into few groups that need little padding."""
    if not layers:
        raise ValueError("no linear layer has changed: there is nothing for an adapter to hold")
    ordered = sorted(layers, key=lambda layer: -layer.density)
    best = [_cheapest(ordered, number) for number in range(1, min(most, len(ordered)) + 1)]
    enough = _ENOUGH * min(cost for cost, _ in best)
    ends = next(ends for cost, ends in best if cost <= enough)
    return [ordered[i:j] for i, j in zip([0, *ends[:-1]], ends, strict=True)]


def _cheapest(ordered: Sequence[_SparseLayer], number: int) -> tuple[float, list[int]]:
    """The division into groups of neighbors with the fewest entries, padding included.

    Returns:
        The number of entries, and where each group ends.
    """
    sums = [0]
    for layer in ordered:
        sums.append(sums[-1] + layer.size)
    found: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for _ in range(number):
        found = {
            j: min(
                (cost + ordered[i].density * (sums[j] - sums[i]), [*ends, j])
                for i, (cost, ends) in found.items()
                if i < j
            )
            for j in range(min(found) + 1, len(ordered) + 1)
        }
    return found[len(ordered)]


def _adapter_files(
    layers: Sequence[_SparseLayer], full: Mapping[str, Mapping[str, Tensor]], base: str | None
) -> dict[str, bytes]:
    # Half an entry more than the densest layer has, so that rounding does not take one away.
    densest = max(layers, key=lambda layer: layer.density)
    sparsity = max(0.0, 1 - (len(densest.indices) + 0.5) / densest.size)
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        padding = int(layer.size * (1 - sparsity)) - len(layer.indices)  # as PEFT counts
        for key, values in (
            ("indices", torch.cat([layer.indices, layer.indices.new_zeros(padding)]).int()),
            ("values", torch.cat([layer.changes, layer.changes.new_zeros(padding)])),
        ):
            tensors[f"{_PREFIX}{layer.name}.supertuning_{key}"] = values
    for state in full.values():
        tensors |= {f"{_PREFIX}{name}": tensor.contiguous() for name, tensor in state.items()}
    return {
        CONFIG_FILE: _config([layer.name for layer in layers], list(full), sparsity, base),
        WEIGHTS_FILE: safetensors.torch.save(tensors, {"format": "pt"}),
    }


def _config(names: Sequence[str], full: list[str], sparsity: float, base: str | None) -> bytes:
    try:
        from peft import SupertuningConfig
    except ImportError as error:
        raise ImportError(
            "the installed PEFT has no Super-Tuning; run: pip install 'peft>=0.21'"
        ) from error
    config: Any = SupertuningConfig(
        base_model_name_or_path=base,
        target_modules=exactly(names),
        modules_to_save=full or None,
        sparsity=sparsity,
        inference_mode=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return (Path(folder) / CONFIG_FILE).read_bytes()
