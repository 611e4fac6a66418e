"""The most memory that a computation takes, found without weights and without data.

It runs on tensors that have shapes and no numbers (torch's `FakeTensorMode`), while a mode adds up
the bytes of those that exist at the same time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class WithoutNumbers:
    """A model whose parameters and buffers have shapes and no numbers.

    Args:
        model: The model; its parameters and buffers are replaced.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        _replace_tensors(model, self._fake)

    def peak(self, run: Callable[[], object]) -> int:
        """Bytes that a computation with the model takes at its highest point.

        The parameters and buffers themselves are not counted, and neither is what a kernel
        allocates inside itself. The model has no gradients before and after.

        The little that the code around a model reads from tensors (checks, counts and averages to
        report) is answered: every condition holds, every number is 0, and no label is left out.
        A model that asks whether a condition holds for any or all entries, to save a mask or to
        replace infinite numbers, is told that it does not.

        Raises:
            RuntimeError: The model reads other numbers (a router does), of which there are none.
        """
        live = _LiveBytes(chain(self.model.parameters(), self.model.buffers()))
        entering = self.model.register_forward_pre_hook(lambda *_: live.enter(+1))
        leaving = self.model.register_forward_hook(lambda *_: live.enter(-1), always_call=True)
        try:
            with self._fake, live:
                run()
        finally:
            entering.remove()
            leaving.remove()
            self.model.zero_grad()
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
        self._depth = 0

    def enter(self, by: int) -> None:
        """Notes that the model is called, or that a call of it has ended."""
        self._depth += by

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            if args[0].dtype == torch.bool:
                return self._depth == 0
            if self._depth == 0:
                return 0.0 if args[0].is_floating_point() else 0
        if function is torch.ops.aten.nonzero.default and self._depth == 0:
            result = torch.empty(args[0].numel(), args[0].dim(), dtype=torch.long)
        else:
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
