"""Fisher information of every trainable parameter, from a model and a few batches."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fish_tuning.arguments import check_choice, check_integer, check_type
from fish_tuning.config import Estimator, Statistic, TokenReduction
from fish_tuning.engines import unwrapped
from fish_tuning.names import opposite_side, side_of
from fish_tuning.parts import Part, totals
from fish_tuning.scoring.calibration import mean_over_examples, trainable_parameters
from fish_tuning.scoring.inputs.batches import Batch
from fish_tuning.scoring.inputs.forward import Forward
from fish_tuning.scoring.objective import ExampleLoss, LossFunction, Objective
from fish_tuning.scoring.scores import FishScores

logger = logging.getLogger(__name__)


class ZeroScoresError(ValueError):
    """Every score is 0: there is nothing to select by."""


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
    loss_fn: LossFunction | ExampleLoss | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FishScores:
    """Scores every trainable parameter by the diagonal of the Fisher information matrix.

    F_j = 1/N sum_i E_y (d log p(y | x_i) / d theta_j)^2, FISH-Tuning (arXiv 2504.04050)
    equation 3, FISH Mask (arXiv 2111.09839) equations 3 and 4. The gradient is squared *per
    example*, so batch size, padding and the order of the examples do not change the scores. All
    gradients of a batch take one backward pass. If a model has a parameter whose gradients cannot
    be computed that way, it is scored one example at a time, and a warning says so. If a batch does
    not fit in memory, this batch and the following ones are scored in halves, with a warning and
    the same scores.

    Labels are read and losses computed as transformers models do: single-label and multi-label
    classification, regression, token classification, causal and sequence-to-sequence language
    models, with -100 for positions without a label. The loss computed here is compared with the
    model's own loss of whole batches; a model with a different loss is scored by its own, one
    example at a time. If the losses of the examples do not add up to that of their batch (class
    weights, in-batch negatives), no example has a loss of its own, and the batch is refused.

    Padding on the right is cut only if the model's outputs stay the same. Padding on the left is
    skipped by position ids only if the outputs are then those of the unpadded example.

    Rows that hold several examples are scored by example: those of transformers'
    `DataCollatorWithFlattening` and of TRL's `packing` and `padding_free`, where `position_ids`
    start again, `seq_idx` changes or `cu_seq_lens_q` divides the row. The scores are those of
    padded batches. If the examples of a row see each other in the model, they have no scores of
    their own, and the batch is refused.

    The model is left as it was, even after an exception: training mode, gradients and the states
    of the random number generators. Dropout is off while scoring.

    With several processes in torch.distributed, all of them call this function, with the same
    model and the same calibration set. Each scores a part of the batches, and all return the
    scores of the whole set. A loader that accelerate or a `DistributedSampler` has divided is read
    undivided, so no example is repeated or dropped. If `fully_shard` (FSDP2) has divided the model,
    each process scores all batches, but only the rows of the parameters that it holds. If DeepSpeed
    ZeRO-3 has divided the frozen weights, each process scores all batches.

    Args:
        model: Any transformers or PEFT model, or an `nn.Module` whose output is the logits or has
            `logits`. For a `DistributedDataParallel`, the wrapped module is scored.
        calibration_dataloader: A `DataLoader` or any iterable of batches: mappings with the key
            `labels`; pairs (inputs, labels); or triples (input ids, attention mask, labels) if
            their values show which is which. Values may be nested mappings, or lists of numbers.
            Keys that the model does not take are dropped (logged once).
        device: Where to score. The model is moved there and stays there. By default it is not
            moved.
        estimator: "empirical" takes y from the data. "true" takes the expectation over
            y ~ p(y | x): exact for single-label and multi-label classification and regression,
            otherwise estimated from sampled labels.
        statistic: "squared", or "absolute" for the mean absolute gradient.
        num_samples: How many examples to use, which may end within a batch or a row; by default
            all.
        label_samples: With the true estimator, how many labels to sample per example, even where
            the exact expectation is known. By default 1 where it is not known.
        token_reduction: The log-likelihood of an example with many labeled tokens: their "mean",
            as models are trained, or their "sum", which is log p of the whole sequence.
        loss_fn: For other models: `loss_fn(outputs, batch)` returns one loss per example, (b,).
            `batch` is the whole batch on the model's device, with one example per row. It is not
            split when memory runs out.
        seed: Seed of the sampled labels; every example has its own random stream.
        progress: Whether to show a progress bar.

    Returns:
        The scores by parameter name, as in `model.named_parameters()`. A score tensor has the
        shape and device of its parameter, in float32 (float64 for float64 parameters). It is
        divided among processes as its parameter is. Their provenance says how they were made.

    Raises:
        TypeError: An argument has the wrong type, such as a model's name for the model.
        ValueError: Nothing is trainable, there is no example, labels are missing or do not fit,
            a loss is not finite, or an argument is out of range; rows hold several examples that
            cannot be told apart or that see each other; the parameters are offloaded or divided
            by an engine other than `fully_shard`, or the processes have different models or
            batches.
        RuntimeError: Another process failed.
        torch.OutOfMemoryError: A single example does not fit in memory.

    Examples:
        >>> scores = calculate_fisher_information(model, loader, num_samples=128)
        >>> scores.provenance["estimator"]
        'empirical'
    """
    model = unwrapped(model)
    check_choice("statistic", statistic, get_args(Statistic))
    check_integer("seed", seed)
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
    scores, num_examples = mean_over_examples(
        parameters, objective, calibration_dataloader, device, num_samples, progress
    )
    _report_zeros(scores)
    provenance = {
        "model": getattr(getattr(model, "config", None), "name_or_path", None) or None,
        "estimator": estimator,
        "statistic": statistic,
        "num_examples": num_examples,
        "label_samples": label_samples,
        "token_reduction": token_reduction,
        "own_loss_fn": loss_fn is not None,
        "scoring_point": "start",
        "seed": seed,
    }
    return FishScores(scores, provenance=provenance)


def score_with_perturbed_b(
    model: nn.Module,
    calibration_dataloader: Iterable[Batch],
    device: torch.device | str | None = None,
    *,
    std: float = 1e-3,
    seed: int = 0,
    **options: Any,
) -> FishScores:
    """Scores LoRA at its usual start, where B = 0 hides what A could do.

    Let y = W x + c B A x, and let G_i = d log p(y_i | x_i) / dW be the gradient of the full weight
    for example i. Then

        d log p / dB = c G_i A^T,        d log p / dA = c B^T G_i,

    so at B = 0 every score of A is 0. Here B ~ N(0, std^2) during scoring only, small enough that
    the model's function hardly changes. The scores of B are those of the start, up to an error
    that vanishes with std. The scores of A, divided by std^2, estimate

        E[F_A[j, m]] / std^2 = c^2 mean_i sum_o G_i[o, m]^2,

    which are the squared column norms of the full weight's per-example gradient and do not depend
    on std. The scores of A and of B differ in scale, so give each its own share with
    `create_mask_from_fisher(..., scope="adaptive")`.

    The side of a LoRA pair that is zero is perturbed: B, or A in PEFT's LoRA of embeddings. Pairs
    without a zero side are scored as they are.

    Args:
        model: A model with LoRA adapters.
        calibration_dataloader: Batches, as in `calculate_fisher_information`.
        device: Where to score, as in `calculate_fisher_information`.
        std: Standard deviation of the perturbation.
        seed: Seed of the perturbation and of sampled labels.
        **options: All other arguments of `calculate_fisher_information`.

    Returns:
        The scores by parameter name. Those opposite a perturbed tensor are divided by std^2, or by
        std for absolute gradients.

    Raises:
        ValueError: `std` is not above 0, or as in `calculate_fisher_information`.
        RuntimeError: As in `calculate_fisher_information`.
        torch.OutOfMemoryError: As in `calculate_fisher_information`.

    Examples:
        >>> scores = score_with_perturbed_b(model, loader, num_samples=128)
        >>> mask = create_mask_from_fisher(scores, 0.5, ["modules_to_save"], scope="adaptive")
    """
    with _zero_sides_perturbed(unwrapped(model), std, seed) as zero_sides:
        scores = calculate_fisher_information(
            model, calibration_dataloader, device, seed=seed, **options
        )
    power = 1 if options.get("statistic") == "absolute" else 2
    for name in zero_sides:
        if (opposite := opposite_side(name)) in scores:
            Part(scores[opposite]).local.div_(std**power)
    scores.provenance |= {"scoring_point": "perturbed", "std": std}
    return scores


@contextmanager
def _zero_sides_perturbed(model: nn.Module, std: float, seed: int) -> Iterator[list[str]]:
    """Inside the block, the zero side of every trainable LoRA pair is drawn from N(0, std^2).

    Yields:
        The names of the perturbed parameters.
    """
    check_type("std", std, Real, "a number above 0")
    check_integer("seed", seed)
    if not std > 0:
        raise ValueError(f"std={std}: must be above 0")
    parameters = trainable_parameters(model)
    sides = {name: parameter for name, parameter in parameters.items() if side_of(name)}
    zero_sides = {name: Part(sides[name]) for name in _all_zero(sides)}
    # Drawn on the CPU, so that a seed gives the same numbers on every device.
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for name, part in zero_sides.items():
                drawn = std * torch.randn(sides[name].shape, generator=generator)
                part.local.copy_(part.take(drawn))
        yield list(zero_sides)
    finally:
        with torch.no_grad():
            for part in zero_sides.values():
                part.local.zero_()


def _all_zero(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that are 0, in all processes."""
    parts = [Part(tensor) for tensor in tensors.values()]
    found = totals(parts, torch.tensor([int(part.local.any()) for part in parts]))
    return [name for name, nonzero in zip(tensors, found.tolist(), strict=True) if not nonzero]


def _report_zeros(scores: Mapping[str, Tensor]) -> None:
    zeros = _all_zero(scores)
    if not zeros:
        return
    if len(zeros) == len(scores):
        raise ZeroScoresError(_why_zero(scores))
    logger.warning(
        "All scores are 0 for %d of %d tensors: %s. No gradient of the loss reached them. The "
        "usual reason is LoRA's start: while B = 0, the gradient of A is 0. In that case score "
        "with score_with_perturbed_b and select with scope='adaptive', score after some training "
        "steps, or start from a B that is not 0 (PiSSA, OLoRA).",
        len(zeros),
        len(scores),
        ", ".join(zeros),
    )


def _why_zero(scores: Mapping[str, Tensor]) -> str:
    sides = {side_of(name) for name in scores}
    if len(sides) == 1 and "" not in sides:
        return (
            f"every score is 0: of LoRA only {sides.pop()} is trainable, and its gradient is 0 "
            "while the other side is 0. Make both trainable and use score_with_perturbed_b, or "
            "start from a B that is not 0 (PiSSA, OLoRA)"
        )
    return (
        "every score is 0: no gradient reaches what is trainable. Likely causes: the loss of a "
        "single example is constant (a contrastive loss needs others), the loss is computed from "
        "detached outputs, it is saturated (half precision underflows), or the adapter is "
        "disabled or not part of the forward pass"
    )
