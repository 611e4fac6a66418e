"""Loaders and batches as people have them: what is certain is read, all else is refused."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from fish_tuning.scoring.inputs.batches import LABELS, Batch, OneExample, described

_NAMES = "name its items: {'input_ids': ..., 'attention_mask': ..., 'labels': ...}"
_ONE_EXAMPLE = (
    "this is a single example, not a batch: wrap the dataset in a DataLoader with a batch_size and "
    "a collator (transformers.default_data_collator, DataCollatorWithPadding, ...)"
)


def check_loader(loader: Any) -> None:
    """Checks that something yields batches, as far as its type tells.

    Raises:
        ValueError: It is a single batch, a dataset, or nothing that yields batches.
    """
    kind = type(loader).__name__
    if isinstance(loader, Mapping):
        if any(hasattr(value, "column_names") for value in loader.values()):
            raise ValueError(
                f"a {kind} holds several datasets ({', '.join(map(str, loader))}): choose one, and "
                "wrap it in a DataLoader with a batch_size and a collator"
            )
        raise ValueError(
            f"a single calibration batch ({described(loader)}) in place of a loader: put it in a "
            "list, [batch]"
        )
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise ValueError(
            f"a {kind} yields single examples, not batches: wrap it in a DataLoader with a "
            "batch_size and a collator"
        )
    if isinstance(loader, str | bytes | Tensor) or not isinstance(loader, Iterable):
        raise ValueError(
            f"the calibration dataloader is a {kind}: give a DataLoader, or a list of batches"
        )


def read_batch(
    value: Any, arguments: Sequence[str], takes_labels: bool, *, only_labels: bool = True
) -> Batch:
    """What a loader yields, as a mapping of arguments or as a pair of the input and the labels.

    Args:
        value: What the loader yields.
        arguments: The names of the model's arguments, in order.
        takes_labels: Whether the model takes labels.
        only_labels: Whether a second item can only be the labels. If not, a loss function of the
            caller gets the items as they are.

    Raises:
        ValueError: It is not certain what the items mean.
    """
    if isinstance(value, OneExample):
        return value
    if hasattr(value, "_fields"):
        value = value._asdict()  # A named tuple.
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return _read_mapping(value)
    _check_is_sequence(value)
    if len(value) > 1 and all(isinstance(item, Mapping) for item in value):
        raise ValueError(
            f"a calibration batch is a list of {len(value)} mappings, which look like single "
            "examples: collate them into one mapping of tensors (collate_fn)"
        )
    if value and isinstance(value[0], Mapping):
        return _read_mapping_and_labels(value)
    if any(isinstance(item, np.ndarray) for item in value):
        value = [_numbers_as_tensor("input", item) for item in value]
    return _read_items(value, arguments, takes_labels) if only_labels else value


def _check_is_sequence(value: Any) -> None:
    if not isinstance(value, list | tuple):
        raise ValueError(
            f"a calibration batch is a {type(value).__name__}: give mappings of tensors, or pairs "
            "(input, labels)"
        )


def _read_items(items: Sequence[Any], arguments: Sequence[str], takes_labels: bool) -> Batch:
    if len(items) == 3 and takes_labels and _is_text_mask_and_labels(items, arguments):
        return dict(zip(("input_ids", "attention_mask", LABELS), items, strict=True))
    if len(items) > 2:
        raise ValueError(
            f"a calibration batch has {len(items)} items without names ({described(items)}), and "
            f"it is not certain which are which: {_NAMES}"
        )
    return _read_pair(items, arguments, takes_labels) if len(items) == 2 else items


def _read_mapping(batch: Mapping[str, Any]) -> Batch:
    batch = {key: _numbers_as_tensor(str(key), value) for key, value in batch.items()}
    _check_has_rows(batch.get(LABELS))
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() == 1:
        raise ValueError(f"input_ids have no batch axis; {_ONE_EXAMPLE}")
    if isinstance(ids, list | tuple) and ids and isinstance(ids[0], Tensor):
        raise ValueError(
            "input_ids is a list of tensors: torch's default collate function turns lists of "
            "numbers on their side. Give the DataLoader a collator (DataCollatorWithPadding, "
            "default_data_collator), or the dataset with_format('torch')"
        )
    return batch


def _read_mapping_and_labels(items: Sequence[Any]) -> Batch:
    batch = dict(items[0])
    if len(items) == 1:
        return _read_mapping(batch)
    if len(items) > 2 or LABELS in batch:
        raise ValueError(
            f"a calibration batch has a mapping and {len(items) - 1} more "
            f"item{'s' * (len(items) > 2)}, and it is not certain what they are: put all that the "
            "model takes into the mapping"
        )
    return _read_mapping({**batch, LABELS: items[1]})


def _read_pair(pair: Sequence[Any], arguments: Sequence[str], takes_labels: bool) -> Batch:
    inputs, labels = pair
    if _looks_like_a_mask(inputs, labels):
        raise ValueError(
            f"a calibration batch is a pair ({described(pair)}) whose second item looks like an "
            f"attention mask, not like labels: {_NAMES}"
        )
    _check_has_rows(labels)
    if takes_labels and arguments:
        # With the labels, the model computes its own loss, which tells how it reads them.
        return {arguments[0]: inputs, LABELS: labels}
    return pair


def _check_has_rows(labels: Any) -> None:
    if isinstance(labels, int | float) or (isinstance(labels, Tensor) and not labels.dim()):
        raise ValueError(f"labels have no batch axis; {_ONE_EXAMPLE}")


def _is_text_mask_and_labels(items: Sequence[Any], arguments: Sequence[str]) -> bool:
    """Whether three tensors can only be token ids, their attention mask and labels.

    Of what has zeros and ones alone, only the mask of padding on the right has ones first: token
    types start with 0.
    """
    ids, mask, labels = items
    if not {"input_ids", "attention_mask"} <= set(arguments) or not _looks_like_a_mask(ids, mask):
        return False
    ones_first = bool(mask[:, 0].all()) and not bool((mask[:, 1:] > mask[:, :-1]).any())
    return ones_first and isinstance(labels, Tensor) and not _looks_like_a_mask(ids, labels)


def _looks_like_a_mask(inputs: Any, labels: Any) -> bool:
    """Whether the second of two tensors of the same shape has zeros or ones alone."""
    if not (isinstance(inputs, Tensor) and isinstance(labels, Tensor)):
        return False
    if labels.dim() < 2 or labels.shape != inputs.shape or inputs.is_floating_point():
        return False
    return labels.dtype == torch.bool or bool(((labels == 0) | (labels == 1)).all())


def _numbers_as_tensor(key: str, value: Any) -> Any:
    """A list of numbers, or of lists of them, or an array as a tensor; anything else as it is."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.tensor(value)
    leaf = value
    while isinstance(leaf, list | tuple) and leaf:
        leaf = leaf[0]
    if not isinstance(value, list | tuple) or not isinstance(leaf, int | float):
        return value
    try:
        return torch.tensor(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{key} is a list of lists of different lengths: pad them with a collator "
            "(DataCollatorWithPadding, DataCollatorForSeq2Seq, ...)"
        ) from error
