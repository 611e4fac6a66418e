"""The labels of a batch: where they are, and which examples have any."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fish_tuning.scoring.inputs.batches import IGNORED, LABELS, Batch
from fish_tuning.scoring.inputs.padding import first_after_padding


def labels_of(batch: Batch) -> Any:
    """The labels: the entry of that name, or the second item of a pair."""
    if isinstance(batch, Mapping):
        return batch.get(LABELS)
    return batch[1] if len(batch) > 1 else None


def has_classes(labels: Any) -> bool:
    """Whether labels are classes, some of which may be ignored."""
    return isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dim() > 0


def has_many_labels(batch: Batch) -> bool:
    """Whether an example has labels of tokens, pixels or the like, and not (b,) or (b, C)."""
    labels = labels_of(batch)
    if not isinstance(labels, Tensor):
        return False
    return labels.dim() > 2 or (labels.dim() == 2 and not labels.is_floating_point())


def most_labeled(batch: Batch) -> int:
    """The example with the most labels; one without labels has no loss to compare."""
    labels = labels_of(batch)
    if not has_classes(labels):
        return 0
    return int((labels != IGNORED).reshape(len(labels), -1).sum(1).argmax())


def copies_input(batch: Batch) -> bool:
    """Whether the labels of tokens are the tokens themselves, as those of language models are."""
    labels = labels_of(batch)
    if not has_classes(labels) or labels.dim() < 2:
        return False
    inputs = (
        [v for k, v in batch.items() if k != LABELS] if isinstance(batch, Mapping) else batch[:1]
    )
    return any(
        isinstance(value, Tensor)
        and value.shape == labels.shape
        and bool(((labels == value) | (labels == IGNORED)).all())
        for value in inputs
    )


_USUAL = {LABELS, "input_ids", "attention_mask", "token_type_ids", "position_ids"} | {
    "decoder_input_ids",
    "decoder_attention_mask",
}


def is_usual(batch: Batch) -> bool:
    """Whether no entry of a batch can be a weight, or what else changes the loss."""
    return isinstance(batch, Mapping) and batch.keys() <= _USUAL


def kind_of(batch: Batch) -> frozenset[str]:
    """The names of a batch's entries: batches of one kind have one kind of loss."""
    return frozenset(batch) if isinstance(batch, Mapping) else frozenset()


def predicted_from_text(labels: Tensor, batch: Batch) -> Tensor:
    """The labels without that of the first token after padding on the left.

    Nothing predicts the first token of an unpadded example, so padding must not either. If padding
    has labels itself, the caller wants the loss of padding to count, and all labels stay.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.shape != labels.shape:
        return labels
    real = mask != 0
    padding_labeled = ((labels != IGNORED) & ~real).any(1, keepdim=True)
    return labels.masked_fill(first_after_padding(real) & ~padding_labeled, IGNORED)
