"""The settings of FISH-Tuning in one object, and the call that carries them out."""

from collections.abc import Iterable
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from fish_tuning.engines import check_maskable
from fish_tuning.mask.mask import FishMask
from fish_tuning.scoring.batches import Batch
from fish_tuning.scoring.fisher import calculate_fisher_information, score_with_perturbed_b
from fish_tuning.scoring.objective import Estimator, LossFunction
from fish_tuning.selection.select import (
    create_mask_from_fisher,
    magnitude_scores,
    pool_and_quota,
    random_scores,
    reversed_scores,
)
from fish_tuning.selection.shares import Scope
from fish_tuning.sparse.apply import apply_mask, get_mask

Criterion = Literal["fisher", "reversed", "random", "magnitude"]
ScoringPoint = Literal["start", "perturbed"]


class FishConfig(BaseModel):
    """How many parameters to train, and how to choose them.

    Exactly one of `keep_ratio` and `num_trainable` is given. `model_dump_json` and
    `model_validate_json` write and read it; the provenance of a mask holds it.

    Raises:
        ValueError: A key is unknown, or a value is not allowed; pydantic names all of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep_ratio: float | None = Field(
        None, gt=0, le=1, description="Fraction of the pool (all but excluded tensors) to train."
    )
    num_trainable: int | None = Field(
        None, ge=1, description="Parameters to train in all, those of excluded tensors counted."
    )
    scope: Scope = Field(
        "adaptive",
        description="How the quota is shared out: one pool (global), to every tensor by its size "
        "(per_tensor), so and within LoRA's to features, on which the ranks take turns (features), "
        "as that but by size and root of the mean score (adaptive), or equally to LoRA's A and B "
        "(balanced).",
    )
    criterion: Criterion = Field(
        "fisher",
        description="What an entry is worth: its Fisher information, that negated (reversed), a "
        "random number, or its magnitude.",
    )
    scoring_point: ScoringPoint = Field(
        "perturbed",
        description="Where Fisher information is taken: at the model as it is (start), or with "
        "LoRA's zero B perturbed, without which A has no score (perturbed).",
    )
    estimator: Estimator = Field(
        "empirical", description="Labels of the data, or the expectation over the model's own."
    )
    num_samples: int | None = Field(
        128, ge=1, description="Calibration examples to score; all of them if null."
    )
    seed: int = Field(0, description="Seeds the perturbation, drawn labels and random scores.")
    names_to_exclude: tuple[str, ...] = Field(
        ("modules_to_save",),
        description="Regular expressions; tensors whose names match are trained whole (the head).",
    )

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.keep_ratio is None) == (self.num_trainable is None):
            raise ValueError("give exactly one of keep_ratio and num_trainable")
        return self


def get_fish_model(
    model: nn.Module,
    config: FishConfig,
    calibration_dataloader: Iterable[Batch] | None = None,
    *,
    loss_fn: LossFunction | None = None,
    progress: bool = True,
) -> nn.Module:
    """Scores the trainable parameters, selects among them and masks the model, in place.

    Args:
        model: A model with its adapter on it.
        config: What to select.
        calibration_dataloader: Batches to score with, as in `calculate_fisher_information`; the
            criteria random and magnitude need none.
        loss_fn: As there.
        progress: As there.

    Returns:
        The same model, masked; `get_mask(model)` is the mask.

    Raises:
        ValueError: As in `calculate_fisher_information`, `create_mask_from_fisher` and
            `apply_mask`; what can be told from the model alone, before anything is scored.
    """
    check_maskable(model)
    if get_mask(model) is not None:
        raise ValueError("the model has a mask already: call remove_mask(model) first")
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if trainable:
        pool_and_quota(
            {name: parameter.numel() for name, parameter in trainable.items()},
            config.keep_ratio,
            config.names_to_exclude,
            config.num_trainable,
        )
    if calibration_dataloader is None and config.criterion in ("fisher", "reversed"):
        raise ValueError(
            f"criterion={config.criterion!r} needs a calibration_dataloader; random and magnitude "
            "do not"
        )
    options: dict[str, Any] = {
        "estimator": config.estimator,
        "num_samples": config.num_samples,
        "loss_fn": loss_fn,
        "seed": config.seed,
        "progress": progress,
    }
    scores = _scores(model, trainable, config, calibration_dataloader, options)
    return apply_mask(model, select(scores, config))


def select(scores: dict[str, Tensor], config: FishConfig) -> FishMask:
    """The mask that a config makes of scores; its provenance is the config."""
    return create_mask_from_fisher(
        scores,
        config.keep_ratio,
        config.names_to_exclude,
        num_trainable=config.num_trainable,
        scope=config.scope,
        provenance=config.model_dump(mode="json"),
    )


def _scores(
    model: nn.Module,
    trainable: dict[str, nn.Parameter],
    config: FishConfig,
    batches: Iterable[Batch] | None,
    options: dict[str, Any],
) -> dict[str, Tensor]:
    if config.criterion == "random":
        return random_scores(trainable, config.seed)
    if config.criterion == "magnitude":
        return magnitude_scores(trainable)
    assert batches is not None
    score = (
        score_with_perturbed_b
        if config.scoring_point == "perturbed"
        else calculate_fisher_information
    )
    scores = score(model, batches, **options)
    return reversed_scores(scores) if config.criterion == "reversed" else scores
