"""A built Trainer and its settings -> a Trainer that trains a masked model."""

from typing import Any

from torch import Tensor
from transformers import Trainer

from fish_tuning.callback import FishTuningCallback
from fish_tuning.config import FishConfig
from fish_tuning.engines import check_maskable
from fish_tuning.fish_model import score_and_select
from fish_tuning.from_trainer.examples import TrainerExamples
from fish_tuning.from_trainer.loss import (
    loss_of_example,
    report_training_step,
    trains_on_model_loss,
)
from fish_tuning.from_trainer.optimizers import follow_mask, parameter_names
from fish_tuning.from_trainer.undisturbed import undisturbed
from fish_tuning.fsdp_plugin import check_settings
from fish_tuning.mask.mask import FishMask
from fish_tuning.scoring.fisher import ZeroScoresError
from fish_tuning.scoring.objective import ExampleLoss
from fish_tuning.sparse.apply import is_masked


def mask_trainer(
    trainer: Trainer, config: FishConfig | None = None, *, progress: bool = True
) -> FishMask:
    """Scores, selects and masks the model of a Trainer, with the Trainer's own data and loss.

    Draws `config.num_samples` examples from the training data, has the Trainer's collator make
    batches of them, and scores with the loss that the Trainer trains with. This works for every
    Trainer that is built on transformers': Seq2SeqTrainer, those of TRL (SFT, DPO, reward, KTO)
    and of sentence-transformers, and your own subclasses. Call it before `train()`.

    If the Trainer adds nothing to its model's loss, as transformers' own and TRL's SFTTrainer do,
    scoring takes one backward pass per batch (`calculate_fisher_information`). Any other loss is
    computed by the Trainer's `compute_loss`, one example at a time: label smoothing, a
    `compute_loss_func`, a subclass's loss, DPO's with its reference model. An example is what the
    collator makes of one item of the data set, for DPO and reward models a pair. KTO's loss of one
    example estimates the KL term from the mismatched completion of this example alone. A loss that
    compares the examples of a batch has no gradient for one of them and is refused.

    The Trainer's metrics, logs, order of training data and random numbers stay as they would have
    been without this call. Dropout is off while scoring. An optimizer that exists already trains
    the selected values afterwards. With several processes, all of them call this function and draw
    the same examples.

    Args:
        trainer: A Trainer that has not trained yet. Its model, masked in place, may have a PEFT
            adapter or train weights of its own.
        config: What to select; by default half of the adapter, `FishConfig(keep_ratio=0.5)`. Its
            seed draws the examples. If the training data is a stream, its first examples are
            taken.
        progress: Whether to show a progress bar while scoring.

    Returns:
        The mask, as `get_mask(trainer.model)`.

    Raises:
        TypeError: `trainer` is no Trainer, or `config` no FishConfig.
        ValueError: The Trainer has no training data, has begun to train, or replaces its model;
            the model has a mask already; all scores are 0; or as in `get_fish_model`.

    Examples:
        The Trainer may be of any kind, and its model has an adapter:

        >>> trainer = Trainer(model, arguments, train_dataset=data)
        >>> mask = mask_trainer(trainer, FishConfig(keep_ratio=0.5))
        >>> result = trainer.train()
    """
    config = FishConfig(keep_ratio=0.5) if config is None else config
    _check(trainer, config)
    try:
        mask, _ = score_trainer(trainer, config, progress)
    except ZeroScoresError as error:
        raise ValueError(_no_gradient(trainer)) from error
    attach_mask(trainer, mask)
    return mask


def attach_mask(trainer: Any, mask: FishMask) -> None:
    """Masks the model of a Trainer that has not trained yet, as if it had been built with a mask.

    Args:
        trainer: The Trainer.
        mask: What to train, as in `apply_mask`.

    Raises:
        ValueError: As in `FishTuningCallback`.
    """
    names = parameter_names(trainer.model)
    callback = FishTuningCallback(mask)
    callback.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
    trainer.pop_callback(FishTuningCallback)  # Of a mask that has been removed.
    trainer.add_callback(callback)
    if trainer.optimizer is not None:
        follow_mask(trainer.optimizer, names, trainer.model)


def score_trainer(
    trainer: Any, config: FishConfig, progress: bool
) -> tuple[FishMask, dict[str, Tensor] | None]:
    """Scores and selects, see `mask_trainer`, and leaves the Trainer and its model as they were.

    Returns:
        The mask, and the scores by parameter name; None if the criterion needs no data.
    """
    by_model = trains_on_model_loss(trainer)
    if not by_model and config.uses_fisher and config.estimator == "true":
        raise ValueError(
            "estimator='true' needs the model's p(y | x), and "
            f"{type(trainer).__name__} has a loss of its own: use estimator='empirical'"
        )
    if config.uses_fisher:
        report_training_step(trainer)
    examples = TrainerExamples(trainer, config.num_samples, config.seed, one_at_a_time=not by_model)
    with undisturbed(trainer):
        return score_and_select(
            trainer.model,
            config,
            examples,
            loss_fn=None if by_model else ExampleLoss(loss_of_example(trainer)),
            progress=progress,
            provenance={"trainer": type(trainer).__name__},
        )


def _check(trainer: Any, config: Any) -> None:
    """Checks what can be told before scoring.

    Raises:
        TypeError: As in `mask_trainer`.
        ValueError: As in `mask_trainer`.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"trainer is a {type(trainer).__name__}: give a Trainer that has been built, "
            "transformers' own or one based on it"
        )
    if not isinstance(config, FishConfig):
        raise TypeError(f"config is a {type(config).__name__}: give a FishConfig")
    name = type(trainer).__name__
    if trainer.state.global_step > 0 or trainer.is_in_train or _has_stepped(trainer.optimizer):
        raise ValueError(
            f"the {name} has begun to train: mask it before train(), or build another one"
        )
    if trainer.model_init is not None:
        raise ValueError(
            f"the {name} builds a new model when it trains (model_init), which would have no mask: "
            "give it a model"
        )
    check_settings(trainer.args)
    check_maskable(trainer.model)
    if is_masked(trainer.model):
        raise ValueError("the model has a mask already: call remove_mask(trainer.model) first")
    if not config.uses_fisher:
        return
    if type(trainer)._prepare_inputs is not Trainer._prepare_inputs:
        raise ValueError(
            f"the {name} makes its training examples while it trains (it has a _prepare_inputs of "
            "its own), so there are none to score: mask the model with "
            "get_fish_model(trainer.model, config, loader)"
        )
    if trainer.train_dataset is None:
        raise ValueError(
            f"the {name} has no train_dataset to draw examples from: give it one, or choose "
            "criterion='random' or 'magnitude'"
        )
    if not getattr(trainer.train_dataset, "__len__", lambda: 1)():
        raise ValueError(
            f"the train_dataset of the {name} is empty: give it one with examples, or choose "
            "criterion='random' or 'magnitude'"
        )


def _has_stepped(optimizer: Any) -> bool:
    return optimizer is not None and bool(optimizer.state)


def _no_gradient(trainer: Any) -> str:
    loss = type(getattr(trainer, "loss", None) or trainer).__name__
    return (
        f"all scores are 0: the loss of {loss} has no gradient for one example alone. A loss that "
        "compares the examples of a batch (in-batch negatives, CoSENT) has none; give each example "
        "a negative of its own (a third column), or choose criterion='random' or 'magnitude'"
    )
