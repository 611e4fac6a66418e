"""What a batch is: how many examples it has, and taking some of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

Batch = Mapping[str, Any] | Sequence[Any]
"""A mapping of forward arguments and labels, or a sequence of the input and the labels."""

LABELS = "labels"

IGNORED = -100
"""The label of tokens that are not part of the likelihood."""


class OneExample(Sequence[Any]):
    """The inputs of one example for a loss that calls the model itself (`ExampleLoss`).

    As a batch it is a sequence of its values. They may have any number of rows (a pair that DPO
    compares has two) and are never divided.

    Args:
        inputs: What the loss takes.
    """

    def __init__(self, inputs: Any) -> None:
        self.inputs = inputs
        self._values = list(inputs.values() if isinstance(inputs, Mapping) else inputs)

    def __getitem__(self, index: Any) -> Any:
        return self._values[index]

    def __len__(self) -> int:
        return len(self._values)


def batch_size(batch: Batch) -> int:
    """The number of examples: the length of the labels, or else of the first tensor.

    Raises:
        ValueError: The batch has no tensor.
    """
    if isinstance(batch, OneExample):
        return 1
    values = [*batch.values()] if isinstance(batch, Mapping) else [*batch]
    if isinstance(batch, Mapping) and isinstance(batch.get(LABELS), Tensor):
        values.insert(0, batch[LABELS])
    for value in values:
        if isinstance(value, Tensor) and value.dim() > 0:
            return len(value)
    names = f"keys {', '.join(batch)}" if isinstance(batch, Mapping) else f"{len(batch)} items"
    raise ValueError(f"no tensor in a calibration batch: {names}")


def take(batch: Batch, rows: slice | Sequence[int]) -> Batch:
    """The examples in these rows; values without one entry per example stay as they are."""
    if isinstance(batch, OneExample):
        return batch
    size = batch_size(batch)

    def part(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > 0 and len(value) == size:
            return value[rows]
        if isinstance(value, list | tuple) and len(value) == size:
            return value[rows] if isinstance(rows, slice) else [value[row] for row in rows]
        return value

    if isinstance(batch, Mapping):
        return {key: part(value) for key, value in batch.items()}
    return [part(value) for value in batch]
