"""The settings of FISH-Tuning: their names, their values and what they mean. No torch."""

import difflib
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Scope = Literal["global", "per_tensor", "balanced", "features", "adaptive"]
"""How the budget is divided before the best entries are taken.

- `"global"`: not at all. The k best entries of the whole pool (arXiv 2504.04050, equation 4).
- `"per_tensor"`: every tensor gets a share in proportion to its size.
- `"balanced"`: LoRA's A, LoRA's B and all other tensors get equal parts, as far as the pool has
  them. Without LoRA this is the same as `"global"`.
- `"features"`: every tensor gets a share in proportion to its size. Within LoRA's tensors the share
  goes to features, which are the columns of A and the rows of B: the features with the highest
  scores, summed over the ranks, come first, and the ranks take turns. See `select_features`.
- `"adaptive"`: like `"features"`, but within a kind (LoRA's A, its B, all other tensors) a tensor's
  share is in proportion to its size times the root of its mean score. No tensor gets a density
  above the geometric mean of its kind's density and one half, or above its kind's density where
  that is higher: the denser a tensor, the lower the learning rate it needs, and all tensors share
  one learning rate.
"""

Criterion = Literal["fisher", "reversed", "random", "magnitude"]
"""What entries are ranked by."""

ScoringPoint = Literal["start", "perturbed"]
"""Where Fisher information is computed."""

Estimator = Literal["empirical", "true"]
"""Where the labels for Fisher information come from: the data, or the model itself."""

Statistic = Literal["squared", "absolute"]
"""What is averaged over the examples: squared gradients (Fisher information) or their magnitude."""

TokenReduction = Literal["mean", "sum"]
"""How the log-likelihoods of an example's tokens are combined into one."""


class SelectionSettings(BaseModel):
    """How entries are scored and selected, for one model and for a whole experiment alike."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scope: Scope = Field(
        default="adaptive",
        description="How the budget is divided before the best entries are taken: not at all "
        "(global); by tensor size (per_tensor); equally to LoRA's A, its B and all other tensors "
        "(balanced); by tensor size and, within LoRA, to the best features, on which the ranks "
        "take turns (features); like features, but by size times the root of the mean score "
        "(adaptive).",
    )
    estimator: Estimator = Field(
        default="empirical",
        description="Fisher information with the labels of the data (empirical), or in expectation "
        "over the model's own predictions (true).",
    )
    num_samples: int | None = Field(
        default=128,
        ge=1,
        description="Calibration examples that Fisher information is computed on; all if null.",
    )


class FishConfig(SelectionSettings):
    """How many parameters to train, and how to choose them.

    Give exactly one of `keep_ratio` and `num_trainable`. `model_dump_json` and
    `model_validate_json` write and read a config, and the provenance of a mask records it.

    Raises:
        ValueError: Keys are unknown, or values are not allowed; the message names all of them.

    Examples:
        >>> FishConfig(num_trainable=56_000).scope
        'adaptive'
    """

    keep_ratio: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Fraction of the pool to train. The pool is all but the excluded tensors.",
    )
    num_trainable: int | None = Field(
        default=None,
        ge=1,
        description="Number of parameters to train in total, excluded tensors included.",
    )
    criterion: Criterion = Field(
        default="fisher",
        description="What entries are ranked by: high Fisher information (fisher), low Fisher "
        "information (reversed), random numbers, or the magnitude of the weights.",
    )
    scoring_point: ScoringPoint = Field(
        default="perturbed",
        description="Where Fisher information is computed: at the model as it is (start), or with "
        "a small random B in place of LoRA's zero B, without which A has no score (perturbed).",
    )
    seed: int = Field(
        default=0,
        description="Seed of the perturbation, of sampled labels, of random scores and of the "
        "examples that `mask_trainer` draws.",
    )
    names_to_exclude: tuple[str, ...] = Field(
        default=("modules_to_save",),
        description="Regular expressions. Tensors with a matching name are trained densely: the "
        "head.",
    )

    if not TYPE_CHECKING:  # The generated signature is the one to check and complete by.

        def __init__(self, **settings: Any) -> None:
            try:
                super().__init__(**settings)
            except ValidationError as error:
                raise ValueError(_in_words(error, type(self).model_fields)) from None

        def __getattr__(self, name: str) -> Any:
            if name == "base_model_name_or_path":  # the first thing that PEFT reads of a config
                raise TypeError(
                    "a FishConfig is not the config of an adapter: add one first, as in "
                    "get_peft_model(model, LoraConfig(...)), and then call "
                    "get_fish_model(model, fish_config, calibration_dataloader)"
                )
            return super().__getattr__(name)

    @property
    def uses_fisher(self) -> bool:
        """Whether the criterion ranks by Fisher information, which takes calibration data."""
        return self.criterion in ("fisher", "reversed")

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if (self.keep_ratio is None) == (self.num_trainable is None):
            raise ValueError("give exactly one of keep_ratio and num_trainable")
        return self


def _in_words(error: ValidationError, fields: dict[str, Any]) -> str:
    """Say in one sentence what is wrong with the settings."""
    problems = []
    for details in error.errors(include_url=False):
        name = ".".join(map(str, details["loc"]))
        message = details["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if details["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the settings are {', '.join(fields)}"
            problems.append(f"{name} is not a setting: {hint}")
        else:
            problems.append(f"{name}={details['input']!r} {message}" if name else message)
    return "; ".join(problems)
