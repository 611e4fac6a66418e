"""The loss that a Trainer trains with, for one example at a time."""

import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import Trainer

from fish_tuning.distributed import world
from fish_tuning.engines import device_of
from fish_tuning.scoring.inputs.segments import find_segments

logger = logging.getLogger(__name__)


def trains_on_model_loss(trainer: Any) -> bool:
    """Whether a Trainer adds nothing to the loss that its model returns.

    Then scoring can recognize the loss and needs one backward pass per batch. A subclass with a
    `compute_loss` of its own may do anything.
    """
    if trainer.label_smoother is not None or trainer.compute_loss_func is not None:
        return False
    if "compute_loss" in vars(trainer):
        return False
    computing = type(trainer).compute_loss
    if computing is Trainer.compute_loss:
        return True
    sft = getattr(sys.modules.get("trl.trainer.sft_trainer"), "SFTTrainer", None)
    if sft is None or computing is not sft.compute_loss:
        return False
    return trainer.args.loss_type == "nll" and not trainer.aux_loss_enabled


def loss_of_example(trainer: Any) -> Callable[[Any], Tensor]:
    """The function from what the collator made of one example to the Trainer's loss of it.

    It does what a training step does with a batch of this one example. The model's modes are left
    alone, and the Trainer is changed: call it where it is `undisturbed`.
    """
    _check_not_gathering(trainer)
    needs_count = _needs_count(trainer.compute_loss_func)

    def loss(inputs: Any) -> Tensor:
        inputs = send_to_device(trainer._prepare_inputs(inputs), device_of(trainer.model))
        _check_not_packed(trainer, inputs)
        count = None
        if needs_count:
            _, count = trainer.get_batch_samples(iter([inputs]), 1, trainer.args.device)
        with trainer.compute_loss_context_manager(), _evaluating(trainer):
            value = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=count)
        return _checked(trainer, value)

    return loss


def report_training_step(trainer: Any) -> None:
    """Says so if a Trainer's training step may add something to its loss."""
    kind = type(trainer)
    owner = next(base for base in kind.__mro__ if "training_step" in vars(base))
    libraries = ("transformers", "trl", "sentence_transformers")
    if "training_step" in vars(trainer) or owner.__module__.partition(".")[0] not in libraries:
        logger.warning(
            "%s has a training_step of its own: scored is the loss of compute_loss, without what "
            "this step adds to it or changes",
            kind.__name__,
        )


@contextmanager
def _evaluating(trainer: Any) -> Iterator[None]:
    """Inside the block `train()` does not turn dropout on in the Trainer's model.

    Raises:
        ValueError: A part of the model has been put into training mode nevertheless.
    """
    model = trainer.model
    attributes = vars(model)
    before = {name: attributes[name] for name in ("train",) if name in attributes}
    attributes["train"] = lambda mode=True: model
    try:
        yield
    finally:
        del attributes["train"]
        attributes.update(before)
    if any(module.training for module in model.modules()):
        raise ValueError(
            f"{type(trainer).__name__}.compute_loss turns on the training mode of a part of the "
            "model, and dropout would be scored: leave the mode as it is"
        )


def _check_not_gathering(trainer: Any) -> None:
    """Checks that a loss of sentence-transformers compares no examples of several processes.

    All processes score the same example, which would become its own negative.

    Raises:
        ValueError: It does.
    """
    loss = getattr(trainer, "loss", None)
    parts = loss.values() if isinstance(loss, dict) else [loss]
    modules = [m for part in parts if isinstance(part, nn.Module) for m in part.modules()]
    if world()[1] > 1 and any(getattr(m, "gather_across_devices", False) for m in modules):
        raise ValueError(
            "the loss takes negatives from other processes (gather_across_devices=True), and they "
            "all score the same example: while you call mask_trainer, set trainer.loss to a loss "
            "without it"
        )


def _needs_count(compute_loss_func: Any) -> bool:
    """Whether a `compute_loss_func` cannot do without the number of tokens.

    Only then is it counted: losses without it are the mean over the example's own tokens, while
    the Trainer's count may include a first token that nothing predicts.
    """
    if not callable(compute_loss_func):
        return False
    parameter = inspect.signature(compute_loss_func).parameters.get("num_items_in_batch")
    return parameter is not None and parameter.default is parameter.empty


def _check_not_packed(trainer: Any, inputs: Any) -> None:
    """Checks that one item of the data set is one example.

    Raises:
        ValueError: It is a row that holds several.
    """
    segments = find_segments(inputs) if isinstance(inputs, Mapping) else None
    if segments is not None and len(segments) > 1:
        raise ValueError(
            f"an item of the training data is a row that holds several examples, and the loss of "
            f"{type(trainer).__name__} cannot be divided among them: set packing=False"
        )


def _checked(trainer: Any, value: Any) -> Tensor:
    """The loss, if it is a scalar whose gradient autograd computes.

    Raises:
        ValueError: It is not.
    """
    name = type(trainer).__name__
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(
            f"{name}.compute_loss returned {getattr(value, 'shape', value)} for one example: a "
            "tensor with a single number is needed"
        )
    if value._backward_hooks:
        # Of sentence-transformers: the hook runs backward passes of its own.
        loss = type(getattr(trainer, "loss", None)).__name__
        raise ValueError(
            f"{name}'s loss ({loss}) computes its gradients in a hook, which scoring cannot see: "
            "while you call mask_trainer, set trainer.loss to the loss of the same name without "
            "'Cached', which has the same gradients"
        )
    return value
