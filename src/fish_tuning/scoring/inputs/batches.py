"""What a batch is: how many examples it has, and taking some of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

Batch = Mapping[str, Any] | Sequence[Any]
"""A mapping of forward arguments and labels, or a sequence of the input and the labels. Values may
be nested mappings and lists."""

LABELS = "labels"

IGNORED = -100
"""The label of what is not part of the likelihood: of tokens, or of whole examples."""

# Their first axis is the batch. That of pixels may be images, tiles or patches.
_BY_EXAMPLE = (LABELS, "input_ids", "attention_mask")


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
    if isinstance(batch, Mapping):
        labels = batch.get(LABELS)
        if isinstance(labels, list | tuple) and not _is_by_output(labels, batch):
            return len(labels)
        values = [batch.get(key) for key in _BY_EXAMPLE] + [*batch.values()]
    else:
        values = [*batch]
    for value in values:
        if isinstance(value, Mapping) and _has_rows(value):
            return batch_size(value)
        if isinstance(value, Tensor) and value.dim() > 0:
            return len(value)
    raise ValueError(
        f"no tensor in a calibration batch ({described(batch)}): tokenize texts, collate examples, "
        "and make tensors of other tables (torch.tensor(frame.to_numpy()))"
    )


def take(batch: Batch, rows: slice | Sequence[int]) -> Batch:
    """The examples in these rows; what all examples share stays as it is.

    Raises:
        ValueError: It is not known which rows of a tensor belong to which example.
    """
    size = batch_size(batch)
    if size == 1:
        return batch
    if isinstance(batch, Mapping):
        return {key: _part(key, value, size, rows) for key, value in batch.items()}
    return [_part(f"item {i}", value, size, rows) for i, value in enumerate(batch)]


def with_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """A value in which `function` has replaced every tensor, also inside mappings and lists."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: with_tensors(v, function) for key, v in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(with_tensors(v, function) for v in value)
    return value


def described(batch: Any) -> str:
    """The entries of a batch and their shapes, for messages."""
    if isinstance(batch, Mapping):
        return ", ".join(f"{key}: {_shape(value)}" for key, value in batch.items())
    if isinstance(batch, list | tuple):
        return ", ".join(_shape(value) for value in batch)
    return _shape(batch)


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {len(value)}".lower()
    return type(value).__name__


def _part(key: str, value: Any, size: int, rows: slice | Sequence[int]) -> Any:
    """The rows of one entry of a batch of `size` examples."""
    if isinstance(value, Mapping):
        return {inner: _part(inner, v, size, rows) for inner, v in value.items()}
    if isinstance(value, list | tuple):
        by_example = len(value) == size
        return _rows(value, rows) if by_example else [_part(key, v, size, rows) for v in value]
    return _part_of_tensor(key, value, size, rows) if isinstance(value, Tensor) else value


def _part_of_tensor(key: str, value: Tensor, size: int, rows: slice | Sequence[int]) -> Tensor:
    if key == "position_ids" and value.dim() == 3 and value.shape[1] == size:
        # M-RoPE: positions in time, height and width.
        return value[:, rows].contiguous()
    if value.dim() > 0 and len(value) == size:
        return value[rows]
    if value.dim() > 1 and len(value) > 1:
        raise ValueError(
            f"{key} has {len(value)} rows for {size} examples, and it is not known which belong to "
            "which example: use batches of one example (batch_size=1)"
        )
    return value


def _is_by_output(labels: Sequence[Any], batch: Mapping[str, Any]) -> bool:
    """Whether a list has a tensor with the labels of all examples for each output of the model."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or len(ids) == len(labels):
        return False
    return all(isinstance(v, Tensor) and v.shape[:1] == ids.shape[:1] for v in labels)


def _rows(values: Sequence[Any], rows: slice | Sequence[int]) -> Sequence[Any]:
    return values[rows] if isinstance(rows, slice) else [values[row] for row in rows]


def _has_rows(batch: Mapping[str, Any]) -> bool:
    return any(
        _has_rows(value) if isinstance(value, Mapping) else getattr(value, "ndim", 0) > 0
        for value in batch.values()
    )
