"""Using a Trainer without leaving a trace in it."""

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)


@contextmanager
def undisturbed(trainer: Any) -> Iterator[None]:
    """Inside the block a Trainer may compute losses and build loaders.

    TRL's losses collect metrics and count tokens, others log. The Trainer logs nothing inside the
    block, and afterwards its attributes and those of its state and accelerator are what they were.
    """
    accelerator = trainer.accelerator
    parts = (trainer, trainer.state, trainer.control, accelerator, accelerator.dataloader_config)
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(_attributes_restored(part))
        trainer.log = _ignore
        # Training sets it before each step; some losses read it.
        trainer.current_gradient_accumulation_steps = 1
        yield


@contextmanager
def _attributes_restored(part: Any) -> Iterator[None]:
    """Inside the block an object has copies of its containers; afterwards what it had before."""
    attributes = vars(part)
    before = dict(attributes)
    attributes.update({name: copied(value) for name, value in before.items()})
    try:
        yield
    finally:
        attributes.clear()
        attributes.update(before)


def copied(value: Any) -> Any:
    """A copy of the built-in containers in a value, which share everything else with it."""
    if type(value) not in _CONTAINERS:
        return value
    copy = value.copy()
    if isinstance(copy, dict):
        copy.update((key, copied(item)) for key, item in copy.items())
    elif isinstance(copy, list):
        copy[:] = map(copied, copy)
    return copy


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands in for a method whose effects are not wanted."""
