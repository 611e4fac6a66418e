"""FISH Mask on a model's own weights beside full fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import nn

from benchmarks.contenders import Contender, trainable
from benchmarks.measure import take_turns
from benchmarks.setting import Setting
from benchmarks.shapes import Shape, batch_of
from benchmarks.table import Row, exact, megabytes, timed
from benchmarks.training_memory import peak_of_training
from fish_tuning import apply_mask, create_mask_from_fisher, random_scores

DENSITY = 0.005
FULL = "full fine-tuning, AdamW"
MASKED = f"FISH Mask, {DENSITY:.1%} of all linear weights"


def full(shape: Shape, device: str) -> nn.Module:
    """The model with all of its parameters trainable."""
    model: nn.Module = shape.build(device)
    return model


def masked(shape: Shape, device: str) -> nn.Module:
    """Entries of the linear layers' weights, and the head."""
    model = shape.build(device)
    weights = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith("classifier")
    }
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in weights or name.startswith("classifier")
    # Entries drawn at random spread over all tensors, which is the hardest case.
    scores = random_scores(trainable(model), seed=0)
    return apply_mask(model, create_mask_from_fisher(scores, DENSITY, ["classifier"]))


def base_weights(setting: Setting) -> Iterator[Row]:
    """Time of a step, and peak memory with short and with long inputs."""
    shape, device = setting.base, setting.device
    ways = {MASKED: partial(masked, shape), FULL: partial(full, shape)}
    sizes = [(4, 8)] if setting.tiny else [(8, 32), (16, 128)]
    batch = batch_of(*sizes[0], device)
    contenders = {name: Contender.of(way(device)) for name, way in ways.items()}
    rounds = take_turns(
        {name: partial(each.step, batch) for name, each in contenders.items()},
        setting.rounds(9),
        device,
    )
    case = f"{shape.name}, batch {sizes[0][0]} x {sizes[0][1]}"
    yield timed(
        f"training step, {case}",
        rounds,
        MASKED,
        FULL,
        at_most=1.1,
        rest="the dense gradients, which are computed on both sides before entries are gathered",
    )
    del contenders
    for size in sizes:
        batch = batch_of(*size, device)
        peaks = {name: peak_of_training(way, batch, device) for name, way in ways.items()}
        yield Row(
            f"peak memory in training, {shape.name}, batch {size[0]} x {size[1]}: {MASKED}",
            FULL,
            f"{megabytes(peaks[MASKED])} against {megabytes(peaks[FULL])}",
            exact(peaks[MASKED] / peaks[FULL]),
            at_most=0.4,
            rest="activations, which a gradient of any weight needs and which grow with the "
            "batch on both sides, and the weights themselves",
        )
