"""The scoring of a batch, to run on tensors without numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.memory.live_bytes import WithoutNumbers
from fish_tuning.experiments.memory.training_step import batch_of, without_numbers
from fish_tuning.experiments.models.checkpointing import enable_checkpointing
from fish_tuning.per_example.sums import GradientSums
from fish_tuning.scoring.calibration import trainable_parameters
from fish_tuning.scoring.checkpointing import checkpointing
from fish_tuning.scoring.inputs.batches import IGNORED, Batch, take
from fish_tuning.scoring.inputs.forward import Forward
from fish_tuning.scoring.inputs.labels import kind_of, labels_of
from fish_tuning.scoring.inputs.outputs import logits_of, loss_of
from fish_tuning.scoring.losses.likelihood import (
    Likelihood,
    Regression,
    SingleLabel,
    Tokens,
    precise,
)
from fish_tuning.scoring.losses.recognition import explains
from fish_tuning.scoring.losses.token_losses import token_losses
from fish_tuning.scoring.losses.whole_batches import WholeBatches
from fish_tuning.scoring.objective import Objective
from fish_tuning.scoring.scorers import BatchScorer


def peak_of_scoring(model: WithoutNumbers, config: ExperimentConfig, num_labels: int) -> int:
    """Bytes that scoring takes at its highest point, the scores included.

    That is in the first batch, which is compared with the model's own loss and with autograd's
    gradients.

    Args:
        model: The arm's model.
        config: The experiment.
        num_labels: Number of the head's outputs; 0 for a language model.

    Raises:
        RuntimeError: As in `WithoutNumbers.peak`.
    """
    enable_checkpointing(model.model, config.training_args)
    model.model.eval()

    forward = Forward(model.model)  # It would take hooks for a loss of the caller's own.
    likelihood = _likelihood(model.model, num_labels)
    examples = batch_of(config, num_labels)

    def run() -> None:
        batch = without_numbers(examples)
        del batch["attention_mask"]
        sums = GradientSums(trainable_parameters(model.model), 2)
        objective = _KnownLoss(forward, likelihood)
        numbers = range(len(batch["labels"]))
        BatchScorer(objective, sums, batch, numbers, lambda reason: reason).add(batch, numbers)

    with torch.enable_grad(), checkpointing(model.model), _padded(model.model):
        return model.peak(run)


def _likelihood(model: Any, num_labels: int) -> Likelihood:
    if num_labels == 0:
        return _EveryToken(shifted=not model.config.is_encoder_decoder)
    return Regression() if num_labels == 1 else _EveryExample()


class _EveryToken(Tokens):
    """All labels are classes, which is not checked."""

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        aligned = self._aligned(logits, labels)
        by_token = token_losses(logits.flatten(0, 1), aligned.flatten(), IGNORED)
        return by_token.view_as(aligned).sum(1) / (aligned != IGNORED).sum(1)


class _EveryExample(SingleLabel):
    """All labels are classes, which is not checked."""

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(precise(logits), labels, reduction="none")


class _KnownLoss(Objective):
    """The losses of a likelihood that is known: there are no numbers to recognize it by."""

    def __init__(self, forward: Forward, likelihood: Likelihood) -> None:
        options: dict[str, Any] = {"estimator": "empirical", "token_reduction": "mean"}
        super().__init__(forward, 2, label_samples=None, loss_fn=None, seed=0, **options)
        self._known = likelihood
        self._whole_batches = _Agreeing(forward, *options.values())

    def recognize(self, batch: Batch, numbers: Sequence[int]) -> None:
        """Calls the model with one example."""
        one = take(batch, slice(0, 1))
        outputs = self.forward(one, with_labels=True)
        own, logits = loss_of(outputs), logits_of(outputs)
        self._whole_batches.note_alone(numbers[0], own, logits, labels_of(one))
        self._likelihood = self._known

    def __call__(self, batch: Batch, numbers: Sequence[int]) -> list[Tensor]:
        """The losses of a batch, which are taken to be finite."""
        return self._losses(batch, numbers)


class _Agreeing(WholeBatches):
    """Compares losses, and finds that they agree."""

    def _compare_with_own(
        self,
        likelihood: Likelihood,
        batch: Batch,
        numbers: Sequence[int],
        logits: Tensor,
        own: Tensor | None,
    ) -> None:
        assert own is not None
        explains(likelihood, logits, labels_of(batch), own.mean())
        self._checked.add(kind_of(batch))


@contextmanager
def _padded(model: nn.Module) -> Iterator[None]:
    """Give the model a mask with its batches, as if some rows were padded."""

    def add(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        ids = kwargs.get("input_ids")
        if ids is None or len(ids) == 1:
            return None
        return args, {**kwargs, "attention_mask": torch.empty_like(ids)}

    hook = model.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
