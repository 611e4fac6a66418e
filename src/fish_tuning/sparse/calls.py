"""How a module is being called: hooks cannot tell when Ctrl-C ended its call."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import nn


def is_being_called(module_id: int) -> bool:
    """Whether a call of a module is on this thread's stack."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if (
            frame.f_code is nn.Module._call_impl.__code__
            and id(frame.f_locals["self"]) == module_id
        ):
            return True
        frame = frame.f_back
    return False


@contextmanager
def untraced() -> Iterator[None]:
    """Keep torch.jit from recording what happens while it traces a call."""
    tracing = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]
