"""Fisher information of every trainable parameter, from a model and a few batches."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fish_tuning.config import Estimator, Statistic, TokenReduction
from fish_tuning.engines import unwrapped
from fish_tuning.names import opposite_side, side_of
from fish_tuning.scoring.batches import Batch, Forward
from fish_tuning.scoring.calibration import mean_over_examples, trainable_parameters
from fish_tuning.scoring.objective import LossFunction, Objective, check_choice

logger = logging.getLogger(__name__)


def calculate_fisher_information(
    model: nn.Module,
    calibration_dataloader: Iterable[Batch],
    device: torch.device | str | None = None,
    *,
    estimator: Estimator = "empirical",
    statistic: Statistic = "squared",
    num_samples: int | None = None,
    label_samples: int | None = None,
    token_reduction: TokenReduction = "mean",
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Scores every trainable parameter by the diagonal of the Fisher information matrix.

    F_j = 1/N sum_i E_y (d log p(y | x_i) / d theta_j)^2, FISH-Tuning (arXiv 2504.04050)
    equation 3, FISH Mask (arXiv 2111.09839) equations 3 and 4. The square is of the gradient of
    *one example*: batch size, padding and the order of the examples do not change the scores.
    The gradients of a batch take one backward pass; a model with a parameter for which that has
    no rule is scored one example at a time, and a warning says so.
    Where memory does not suffice for a batch it is scored in halves, and so are those after it: a
    warning says so, and the scores are the same.

    Labels are read and losses computed as transformers models do: single-label classification,
    multi-label classification, regression, token classification, causal and sequence-to-sequence
    language models, -100 for positions without a label. The reading is compared with the model's
    own loss on one example; a model with another loss is scored by it, one example at a time.

    Everything borrowed comes back as it was, also after an exception: training mode, gradients,
    the states of the random number generators. Dropout is off while scoring.

    Where torch.distributed has several processes, all of them call, with the same model and the
    same calibration set. Each scores every n-th batch, and all return the scores of the whole
    set. A loader that accelerate or a `DistributedSampler` has divided counts as the whole one,
    without the examples that those repeat or drop.

    Args:
        model: Any transformers or PEFT model, or an `nn.Module` whose output has `logits` or is
            the logits. Of a `DistributedDataParallel`, its module is scored.
        calibration_dataloader: Batches; a `DataLoader` or any iterable of mappings, with
            `labels` among the keys. Keys that the model does not take are dropped (logged once).
        device: Where to score; the model is moved there and stays. By default where it is.
        estimator: "empirical" takes y from the data. "true" takes the expectation over
            y ~ p(y | x): exact for classifiers, multi-label classifiers and regression,
            from drawn labels otherwise.
        statistic: "squared", or "absolute" for the mean absolute gradient.
        num_samples: How many examples to use; by default all.
        label_samples: With the true estimator, draw that many labels for each example, even where
            the exact expectation is known. By default 1 where it is not.
        token_reduction: The log-likelihood of an example with many labelled tokens: their "mean",
            as models are trained, or their "sum", log p of the whole sequence.
        loss_fn: For other models: `loss_fn(outputs, batch)` returns one loss an example, (b,).
            `batch` is the whole batch on the model's device; it is not divided where memory
            does not suffice.
        seed: Seeds the drawn labels; each example has its own stream.
        progress: Whether to show a progress bar.

    Returns:
        The scores by parameter name, as in `model.named_parameters()`: the parameter's shape and
        device, float32 (float64 for float64 parameters).

    Raises:
        ValueError: Nothing is trainable, there is no example, labels are missing or do not fit,
            a loss is not finite, or an argument is out of range; the parameters are sharded or
            offloaded, or the processes have different models or batches.
        RuntimeError: Another process failed.
        torch.OutOfMemoryError: Memory does not suffice for one example alone.
    """
    model = unwrapped(model)
    check_choice("statistic", statistic, get_args(Statistic))
    parameters = trainable_parameters(model)
    objective = Objective(
        Forward(model),
        power=2 if statistic == "squared" else 1,
        estimator=estimator,
        label_samples=label_samples,
        token_reduction=token_reduction,
        loss_fn=loss_fn,
        seed=seed,
    )
    scores = mean_over_examples(
        parameters, objective, calibration_dataloader, device, num_samples, progress
    )
    _report_zeros(scores)
    return scores


def score_with_perturbed_b(
    model: nn.Module,
    calibration_dataloader: Iterable[Batch],
    device: torch.device | str | None = None,
    *,
    std: float = 1e-3,
    seed: int = 0,
    **options: Any,
) -> dict[str, Tensor]:
    """Scores LoRA at its usual start, where B = 0 hides what A could do.

    With y = W x + c B A x and G_i = d log p(y_i | x_i) / dW the full weight's gradient,

        d log p / dB = c G_i A^T,        d log p / dA = c B^T G_i,

    so at B = 0 every score of A is 0. Here B ~ N(0, std^2) for the scoring pass alone, so small
    that the model's function hardly moves. B's scores stay what they are at the start, and A's,
    divided by std^2, are an estimate of

        E[F_A[j, m]] / std^2 = c^2 mean_i sum_o G_i[o, m]^2,

    the squared column norms of the full weight's per-example gradient, in which std no longer
    occurs. Scores of A and of B have different scales: give each its share with
    `create_mask_from_fisher(..., scope="adaptive")`.

    Whichever side of a LoRA pair is zero is perturbed (for embeddings in PEFT that is A); pairs
    with no zero side are scored as they are.

    Args:
        model: A model with LoRA adapters.
        calibration_dataloader: As in `calculate_fisher_information`.
        device: As there.
        std: Standard deviation of the perturbation.
        seed: Seeds the perturbation (and drawn labels).
        **options: Everything else that `calculate_fisher_information` takes.

    Returns:
        The scores by parameter name; those opposite a perturbed tensor are divided by std^2.

    Raises:
        ValueError: As in `calculate_fisher_information`; `std` is not above 0.
        RuntimeError: As there.
        torch.OutOfMemoryError: As there.
    """
    with zero_sides_perturbed(unwrapped(model), std, seed) as zero_sides:
        scores = calculate_fisher_information(
            model, calibration_dataloader, device, seed=seed, **options
        )
    power = 1 if options.get("statistic") == "absolute" else 2
    for name in zero_sides:
        if (opposite := opposite_side(name)) in scores:
            scores[opposite] /= std**power
    return scores


@contextmanager
def zero_sides_perturbed(model: nn.Module, std: float, seed: int) -> Iterator[list[str]]:
    """Inside the block, whichever side of a LoRA pair is zero is drawn from N(0, std^2).

    Args:
        model: A model with LoRA adapters.
        std: Standard deviation.
        seed: Seeds the draw.

    Yields:
        The names of those parameters.

    Raises:
        ValueError: `std` is not above 0, nothing is trainable, or something is offloaded.
    """
    if not std > 0:
        raise ValueError(f"std={std}: above 0")
    zero_sides = {
        name: parameter
        for name, parameter in trainable_parameters(model).items()
        if side_of(name) and not parameter.any()
    }
    # On the CPU, so that a seed means the same numbers on every device.
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for parameter in zero_sides.values():
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
        yield list(zero_sides)
    finally:
        with torch.no_grad():
            for parameter in zero_sides.values():
                parameter.zero_()


def _report_zeros(scores: dict[str, Tensor]) -> None:
    zeros = [name for name, score in scores.items() if not score.any()]
    if not zeros:
        return
    logger.warning(
        "All scores are 0 for %d of %d tensors: %s. No information reached them from the loss. "
        "The usual reason is LoRA's start: while B = 0 the gradient of A is 0. Then score with "
        "score_with_perturbed_b and select with scope='adaptive', score after some training "
        "steps, or start from a B that is not 0 (PiSSA, OLoRA).",
        len(zeros),
        len(scores),
        ", ".join(zeros),
    )
