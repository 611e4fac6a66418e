"""LoRA's A along the directions that hold the most Fisher information."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fish_tuning.engines import unwrapped
from fish_tuning.per_example.reduction import RowMoments
from fish_tuning.scoring.batches import Batch
from fish_tuning.scoring.calibration import mean_over_examples, trainable_parameters
from fish_tuning.scoring.fisher import zero_sides_perturbed
from fish_tuning.selection.lora import opposite_side, side_of

logger = logging.getLogger(__name__)


def align_with_fisher(
    model: nn.Module,
    calibration_dataloader: Iterable[Batch],
    device: torch.device | str | None = None,
    *,
    std: float = 1e-3,
    seed: int = 0,
    **options: Any,
) -> None:
    """Turns the rows of LoRA's A to where B will have the most Fisher information, in place.

    LoRA draws A at random: in d dimensions its r rows see a share of about r / d of what the
    gradient could do. With y = W x + c B A x and G_i = d log p(y_i | x_i) / dW, the Fisher
    information of all entries of B at B = 0 is

        sum F_B = c^2 mean_i |G_i A^T|^2 = c^2 tr(A M A^T),        M = mean_i G_i^T G_i,

    which among r orthogonal rows of a given length is largest where these are the leading r
    eigenvectors of M. A gets them in that order, each as long as its rows were on average. B stays
    zero, so the model computes what it did.

    M takes no gradient of W: with B ~ N(0, std^2) for the pass, d log p / dA = c B^T G_i, and
    E[(B^T G_i)^T (B^T G_i)] = r std^2 G_i^T G_i. Each of N examples gives r rows to estimate from.

    Pairs of linear layers whose B is zero are aligned, in all adapters that are trainable. Memory:
    d^2 numbers for each of them.

    Args:
        model: A model with LoRA adapters as they start.
        calibration_dataloader: As in `calculate_fisher_information`.
        device: As there.
        std: Standard deviation of the perturbation.
        seed: Seeds the perturbation, and drawn labels.
        **options: Everything else that `calculate_fisher_information` takes, but `statistic`.

    Raises:
        ValueError: As there; no pair can be aligned, or `std` is not above 0.
        RuntimeError: As there.
        torch.OutOfMemoryError: As there.
    """
    model = unwrapped(model)
    with zero_sides_perturbed(model, std, seed) as zero_sides:
        opposite = {opposite_side(name) for name in zero_sides}
        pairs = {
            name: parameter
            for name, parameter in trainable_parameters(model).items()
            if name in opposite
            and side_of(name) == "A"
            and "lora_embedding_" not in name
            and parameter.dim() == 2
        }
        if not pairs:
            raise ValueError(
                "no trainable LoRA pair of a linear layer has a zero B, so there is nothing to "
                "align: align LoRA before it is trained, and not with a start of its own (PiSSA)"
            )
        moments = mean_over_examples(
            model, pairs, calibration_dataloader, RowMoments(), device, seed=seed, **options
        )
    for name, parameter in pairs.items():
        if not moments[name].any():
            logger.warning("%s stays as it is: no gradient reaches it", name)
            continue
        directions = _leading_eigenvectors(moments[name], len(parameter), seed)
        with torch.no_grad():
            length = parameter.norm(dim=1).mean()
            parameter[: len(directions)] = length * directions.to(parameter.dtype)


def _leading_eigenvectors(moments: Tensor, count: int, seed: int) -> Tensor:
    """Rows: the eigenvectors of a positive semi-definite matrix, of the largest eigenvalues first.

    The sign is that by which the largest entry is positive.
    """
    count = min(count, len(moments))
    devices = [] if moments.device.type == "cpu" else [moments.device]
    with torch.random.fork_rng(devices=devices, device_type=moments.device.type):
        torch.manual_seed(seed)
        # Randomised subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 5.3): a whole
        # decomposition would take minutes where layers are wide.
        wide = min(2 * count + 8, len(moments))
        vectors = torch.svd_lowrank(moments / moments.trace(), q=wide, niter=4)[0][:, :count].T
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * largest.sign()
