"""Every way in which the numbers of a model are read, by people, by PEFT or by torch."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import convert_to_lora
from torch import Tensor

from fish_tuning import get_mask, remove_mask
from tests.sparse.twins import Twins, assert_both_close, copied, inputs, output_of, reload

IDS = inputs()


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved_by_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def without_gradients(model: Any, folder: Path) -> Tensor:
    with torch.no_grad():
        return output_of(model, IDS)


def merged_and_unmerged(model: Any, folder: Path) -> Tensor:
    model.merge_adapter()
    merged = without_gradients(model, folder)
    model.unmerge_adapter()
    return torch.stack([merged, without_gradients(model, folder)])


def weighted(model: Any, folder: Path) -> Tensor:
    model.add_weighted_adapter(["default", "default"], [0.5, 0.2], "w", combination_type="linear")
    model.set_adapter("w")
    return without_gradients(model, folder)


def delta_weights(model: Any, folder: Path) -> Tensor:
    layers = [m for m in model.modules() if hasattr(m, "get_delta_weight")]
    return torch.cat([layer.get_delta_weight("default").reshape(-1) for layer in layers])


def reloaded(model: Any, folder: Path) -> Tensor:
    model.save_pretrained(folder)
    return without_gradients(reload("lora", folder).eval(), folder)


def exported(model: Any, folder: Path) -> Tensor:
    return torch.export.export(model, (), {"input_ids": IDS}).module()(input_ids=IDS)


def converted(model: Any, folder: Path) -> Tensor:
    """What PEFT's conversion to LoRA of the same rank gives, as products of B and A."""
    _, state = convert_to_lora(model, rank=2)
    names = sorted(name for name in state if ".lora_A." in name)
    return torch.cat([state[name.replace("lora_A", "lora_B")] @ state[name] for name in names])


class Caller(torch.nn.Module):
    """Somebody's module around the model, which gives it its input by name."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return output_of(self.model, input_ids)


def exported_inside(model: Any, folder: Path) -> Tensor:
    return torch.export.export(Caller(model), (IDS,)).module()(IDS)


def traced(model: Any, folder: Path) -> Tensor:
    return torch.jit.trace(Caller(model), IDS)(IDS)


def mask_removed(model: Any, folder: Path) -> Tensor:
    if get_mask(model) is not None:
        remove_mask(model)
    return without_gradients(model, folder)


READERS: dict[str, Callable[[Any, Path], Tensor]] = {
    "forward": lambda model, folder: output_of(model, IDS),
    "forward, no gradients": without_gradients,
    "state dict": lambda model, folder: torch.cat(
        [t.reshape(-1) for n, t in model.state_dict().items()]
    ),
    "saved": reloaded,
    "merge_adapter": merged_and_unmerged,
    "merge_and_unload": lambda model, folder: without_gradients(model.merge_and_unload(), folder),
    "get_delta_weight": delta_weights,
    "convert_to_lora": converted,
    "add_weighted_adapter": weighted,
    "deepcopy": lambda model, folder: without_gradients(copied(model), folder),
    "pickle": lambda model, folder: without_gradients(pickled(model), folder),
    "torch.save": lambda model, folder: without_gradients(saved_by_torch(model), folder),
    "copy, merged": lambda model, folder: without_gradients(
        copied(model).merge_and_unload(), folder
    ),
    "remove_mask": mask_removed,
    "export": exported,
    "export of a model around it": exported_inside,
    "jit.trace": traced,
}


def assert_reads_the_same(twins: Twins, reader: str, folder: Path) -> None:
    read = READERS[reader]
    results = [
        read(model.eval(), folder / kind)
        for kind, model in zip(("masked", "dense"), twins.models(), strict=True)
    ]
    assert_both_close(results, reader)
