"""The most memory that a training step takes, found without weights and without data.

The step runs on tensors that have shapes and no numbers (torch's `FakeTensorMode`), while a mode
adds up the bytes of those that exist at the same time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_of_step(
    model: nn.Module,
    batch: Callable[[], Mapping[str, Tensor]],
    *,
    autocast: torch.dtype | None = None,
) -> int:
    """Bytes that a forward and a backward pass take at their highest point.

    Activations, what loss and autocast compute, and the gradients of all parameters that require
    them are counted; the parameters and buffers themselves are not, and neither is what a kernel
    allocates inside itself. Like a `Trainer`, the step keeps no outputs but the loss.

    Args:
        model: The model; its parameters and buffers are replaced by tensors without numbers.
        batch: Makes the model's inputs, with `labels`.
        autocast: The dtype that the forward pass computes in.

    Raises:
        RuntimeError: The model looks at numbers (a router does), of which there are none.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    _replace_tensors(model, fake)
    live = _LiveBytes(chain(model.parameters(), model.buffers()))
    with fake, live:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = model(**batch()).loss
        loss.backward()
    return live.most


def _replace_tensors(model: nn.Module, fake: FakeTensorMode) -> None:
    """Put tensors without numbers in the place of parameters and buffers; tied ones stay tied."""
    replaced: dict[int, Tensor] = {}
    for module in model.modules():
        places: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in places:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in replaced:
                    with fake:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    replaced[id(tensor)] = (
                        nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                    )
                tensors[name] = replaced[id(tensor)]


class _LiveBytes(TorchDispatchMode):
    """Adds up the bytes of the storages that operations make, for as long as they exist.

    Args:
        known: Tensors whose memory does not count.

    Attributes:
        most: The most bytes so far.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self._now = self.most = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._now += storage.nbytes()
            self.most = max(self.most, self._now)
            # PyTorch keeps the Python object of a storage for as long as the storage exists.
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._sizes.pop(key)
