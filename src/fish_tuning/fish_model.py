"""A model and its settings -> a masked model: scoring, selecting and masking in one call."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fish_tuning.arguments import check_type
from fish_tuning.config import FishConfig
from fish_tuning.engines import check_maskable
from fish_tuning.mask.mask import FishMask
from fish_tuning.scoring.fisher import calculate_fisher_information, score_with_perturbed_b
from fish_tuning.scoring.inputs.batches import Batch
from fish_tuning.scoring.objective import ExampleLoss, LossFunction
from fish_tuning.selection.budget import pool_and_quota
from fish_tuning.selection.criteria import magnitude_scores, random_scores, reversed_scores
from fish_tuning.selection.select import create_mask_from_fisher
from fish_tuning.sparse.apply import apply_mask, is_masked


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
        calibration_dataloader: Batches to score with, as in `calculate_fisher_information`. The
            criteria "random" and "magnitude" need none.
        loss_fn: As in `calculate_fisher_information`.
        progress: Whether to show a progress bar while scoring.

    Returns:
        The same model, masked; `get_mask(model)` is the mask.

    Raises:
        ValueError: As in `calculate_fisher_information`, `create_mask_from_fisher` and
            `apply_mask`. Whatever the model alone can tell is checked before scoring.

    Examples:
        >>> model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS"))
        >>> model = get_fish_model(model, FishConfig(keep_ratio=0.5), loader)
        >>> trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        >>> optimizer = torch.optim.AdamW(trained, lr=1e-3)
    """
    check_maskable(model)
    check_config(config)
    if is_masked(model):
        raise ValueError("the model has a mask already: call remove_mask(model) first")
    mask, _ = score_and_select(
        model, config, calibration_dataloader, loss_fn=loss_fn, progress=progress
    )
    return apply_mask(model, mask)


def score_and_select(
    model: nn.Module,
    config: FishConfig,
    calibration_dataloader: Iterable[Batch] | None,
    *,
    loss_fn: LossFunction | ExampleLoss | None = None,
    progress: bool = True,
    provenance: Mapping[str, Any] | None = None,
) -> tuple[FishMask, dict[str, Tensor] | None]:
    """Scores the trainable parameters of a model and selects among them.

    Args:
        model: A model with its adapter on it; it is not changed.
        config: What to select.
        calibration_dataloader: As in `get_fish_model`.
        loss_fn: As in `calculate_fisher_information`.
        progress: Whether to show a progress bar while scoring.
        provenance: What to record besides the config in the provenance of the mask.

    Returns:
        The mask, and the Fisher information of each entry; None if the criterion does not use it.

    Raises:
        ValueError: As in `get_fish_model`.
    """
    check_config(config)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if trainable:  # Scoring refuses a model without any, and says what to do.
        sizes = {name: parameter.numel() for name, parameter in trainable.items()}
        pool_and_quota(sizes, config.keep_ratio, config.names_to_exclude, config.num_trainable)
    information = None
    if config.criterion == "random":
        scores = random_scores(trainable, config.seed)
    elif config.criterion == "magnitude":
        scores = magnitude_scores(trainable)
    else:
        information = _fisher_information(model, config, calibration_dataloader, loss_fn, progress)
        scores = information if config.criterion == "fisher" else reversed_scores(information)
    mask = create_mask_from_fisher(
        scores,
        config.keep_ratio,
        config.names_to_exclude,
        num_trainable=config.num_trainable,
        scope=config.scope,
        provenance=config.model_dump(mode="json") | dict(provenance or {}),
    )
    return mask, information


def check_config(config: object) -> None:
    """Checks that an argument is a `FishConfig`.

    Raises:
        TypeError: It is something else.
    """
    wanted = "FishConfig(**config)" if isinstance(config, dict) else "a FishConfig"
    check_type("config", config, FishConfig, wanted)


def _fisher_information(
    model: nn.Module,
    config: FishConfig,
    calibration_dataloader: Iterable[Batch] | None,
    loss_fn: LossFunction | ExampleLoss | None,
    progress: bool,
) -> dict[str, Tensor]:
    if calibration_dataloader is None:
        raise ValueError(
            f"criterion={config.criterion!r} needs a calibration_dataloader; only the criteria "
            "random and magnitude do not"
        )
    perturbed = config.scoring_point == "perturbed"
    score = score_with_perturbed_b if perturbed else calculate_fisher_information
    return score(
        model,
        calibration_dataloader,
        estimator=config.estimator,
        num_samples=config.num_samples,
        loss_fn=loss_fn,
        seed=config.seed,
        progress=progress,
    )
