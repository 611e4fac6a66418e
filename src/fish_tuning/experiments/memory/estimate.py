"""Memory per device of training and scoring each arm, from the model's config.json alone."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fish_tuning.experiments.arms import Arm, ArmKey, planned
from fish_tuning.experiments.config.devices import Devices
from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.errors import ConfigError, first_line
from fish_tuning.experiments.memory.live_bytes import WithoutNumbers
from fish_tuning.experiments.memory.masked_gradients import MaskedGradients
from fish_tuning.experiments.memory.scoring_step import peak_of_scoring
from fish_tuning.experiments.memory.training_step import peak_of_training
from fish_tuning.experiments.models.adapters import adapted_without_weights, trainable_tensors
from fish_tuning.experiments.models.counts import ParameterCounts, names_left_dense
from fish_tuning.experiments.models.load import DTYPES, HEADS

logger = logging.getLogger(__name__)

FLOAT32 = 4
INDEX = 4
"""Bytes of a selected entry's position."""
OPTIMIZERS = {"adamw_torch": 2, "adamw_torch_fused": 2, "adagrad": 1, "rmsprop": 1, "sgd": 0}
"""Numbers that an optimizer keeps for each parameter."""
QUANTIZED = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}
"""Bytes per weight: bitsandbytes keeps a float32 scale for every 64 weights of 4 bits."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the highest point of training or scoring.

    Attributes:
        weights: Frozen weights and buffers, and the layers that an engine gathers.
        trained: The trained tensors, with what a mask keeps of them; with scores while scoring.
        optimizer: Its numbers for each trained parameter, AdamW's two, and DDP's gradient buckets.
        step: Activations, gradients, loss, and whatever else a batch needs for a while; None if
            it cannot be estimated.
    """

    weights: int
    trained: int
    optimizer: int
    step: int | None

    @property
    def total(self) -> int | None:
        """All of it; None if a part cannot be estimated."""
        if self.step is None:
            return None
        return self.weights + self.trained + self.optimizer + self.step


@dataclass(frozen=True)
class ArmMemory:
    """The memory of an arm: of its training, and of its scoring if it scores."""

    training: Memory
    scoring: Memory | None


def estimate_memory(
    config: ExperimentConfig,
    counts: Mapping[ArmKey, ParameterCounts],
    num_labels: int,
    devices: Devices,
) -> dict[ArmKey, ArmMemory]:
    """Estimate the memory of every arm at every budget.

    The batch is the experiment's: `per_device_train_batch_size` inputs of the greatest length. What
    a framework reserves beyond its tensors is not counted: on an accelerator, some 0.5 to 1 GiB,
    and what the allocator's fragments take.

    Args:
        config: The experiment.
        counts: The parameters of every arm.
        num_labels: Number of the head's outputs; 0 for a language model.
        devices: The devices.

    Returns:
        The memory by arm. Why a step of it cannot be run without numbers is logged.

    Raises:
        ConfigError: An arm's model cannot be built or trained, or the optimizer is not known.
    """
    arms = {arm.key: arm for arm in planned(config)}
    return {key: _of_arm(config, arms[key], counts[key], num_labels, devices) for key in counts}


def _of_arm(
    config: ExperimentConfig, arm: Arm, count: ParameterCounts, num_labels: int, devices: Devices
) -> ArmMemory:
    quantization = config.model.quantization
    model = adapted_without_weights(config, arm, num_labels)
    dtype = DTYPES[config.model.precision]
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    stand_in = WithoutNumbers(model)
    pool = trainable_tensors(model)
    gathered = _gathered_bytes(model) if devices.of_weights > 1 else 0
    held = _frozen_bytes(model, quantization) // devices.of_weights + gathered
    dequantized = _dequantized_bytes(model, quantization)
    scoring = None
    if arm.criterion in ("fisher", "reversed"):
        entries = sum(tensor.numel() for tensor in pool.values())
        scoring = Memory(
            weights=held,
            trained=2 * FLOAT32 * entries // devices.of_weights,
            optimizer=0,
            step=_or_none(
                config,
                lambda: (
                    dequantized + peak_of_scoring(stand_in, config, num_labels) - FLOAT32 * entries
                ),
            ),
        )
    masked = _masked_part(config, arm, pool, count.trainable)
    gradients = MaskedGradients(*masked) if masked else None
    training = Memory(
        weights=held,
        trained=_trained_bytes(count.trainable, masked, devices),
        optimizer=_optimizer_bytes(config, count.trainable, devices),
        step=_or_none(
            config,
            lambda: (
                dequantized
                + peak_of_training(
                    stand_in,
                    config,
                    num_labels,
                    kernels=devices.kind == "gpu",
                    on_gradients=gradients.finish if gradients else lambda: None,
                )
            ),
        ),
    )
    return ArmMemory(training, scoring)


def _masked_part(
    config: ExperimentConfig, arm: Arm, pool: Mapping[str, nn.Parameter], k: int
) -> tuple[dict[str, nn.Parameter], int] | None:
    """The tensors that an arm's mask selects from, and how many entries; None without a mask."""
    if arm.criterion is None:
        return None
    entries = {name: tensor.numel() for name, tensor in pool.items()}
    dense = names_left_dense(config, entries, k)
    whole = {name for name in pool if any(re.search(pattern, name) for pattern in dense)}
    masked = {name: tensor for name, tensor in pool.items() if name not in whole}
    return masked, k - sum(entries[name] for name in whole)


def _trained_bytes(
    k: int, masked: tuple[Mapping[str, nn.Parameter], int] | None, devices: Devices
) -> int:
    """Bytes of the parameters that are trained, and of what a mask keeps beside them.

    That is undivided: all entries of its tensors, and for each selected one its place and the
    number on which tensor and values last agreed.
    """
    values = FLOAT32 * k // devices.of_weights
    if masked is None:
        return values
    tensors, selected = masked
    entries = sum(tensor.numel() for tensor in tensors.values())
    return values + FLOAT32 * entries + (INDEX + FLOAT32) * selected


def _optimizer_bytes(config: ExperimentConfig, k: int, devices: Devices) -> int:
    name = config.training_args.get("optim", "adamw_torch")
    if name not in OPTIMIZERS:
        raise ConfigError(
            f"{config.argument_path('optim')}: the memory of {name!r} is not known; plan without "
            f"--memory, or use one of {', '.join(OPTIMIZERS)}"
        )
    buckets = FLOAT32 * k if devices.engine == "ddp" and devices.count > 1 else 0
    return OPTIMIZERS[name] * FLOAT32 * k // devices.of_optimizer + buckets


def _frozen_bytes(model: nn.Module, quantization: str | None) -> int:
    tensors: dict[int, Tensor] = {
        id(tensor): tensor
        for tensor in [*model.parameters(), *model.buffers()]
        if not tensor.requires_grad
    }
    quantized = {id(weight) for weight in _quantized(model)} if quantization else set()
    return sum(
        math.ceil(tensor.numel() * QUANTIZED[quantization])
        if quantization and key in quantized
        else tensor.numel() * tensor.element_size()
        for key, tensor in tensors.items()
    )


def _quantized(model: nn.Module) -> Iterable[Tensor]:
    """The weights that bitsandbytes quantizes: of linear layers, but not of the head."""
    for name, module in model.named_modules():
        is_head = name.rpartition(".")[2] in HEADS
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and not is_head:
            yield module.weight


def _dequantized_bytes(model: nn.Module, quantization: str | None) -> int:
    """Bytes of the largest quantized weight while it is multiplied, in half precision."""
    if not quantization:
        return 0
    return 2 * max((weight.numel() for weight in _quantized(model)), default=0)


def _gathered_bytes(model: nn.Module) -> int:
    """Bytes of the weights that `fully_shard` has in full at once.

    These are the block that computes, the next one, and what is in no block.
    """
    blocks = max(
        (module for module in model.modules() if isinstance(module, nn.ModuleList)),
        key=_parameter_bytes,
        default=nn.ModuleList(),
    )
    largest = max(map(_parameter_bytes, blocks), default=0)
    return _parameter_bytes(model) - _parameter_bytes(blocks) + min(2, len(blocks)) * largest


def _parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _or_none(config: ExperimentConfig, peak: Callable[[], int]) -> int | None:
    """What a step takes; None, and a warning that says why, if it cannot be run without numbers.

    Raises:
        ConfigError: The model or its Trainer refuses the step, as it will with numbers.
    """
    # It prints a traceback for each operation that it cannot run.
    logging.getLogger(FakeTensorMode.__module__).setLevel(logging.CRITICAL)
    try:
        return peak()
    except (AttributeError, ValueError) as error:
        raise ConfigError(
            f"model.name: {config.model.name!r} cannot be trained so: {first_line(error)}; "
            "correct its config.json or model.config_overrides, or the training arguments"
        ) from error
    except (NotImplementedError, RuntimeError) as error:
        logger.warning(
            "No estimate of a step of %r, which cannot be run without weights: %s",
            config.model.name,
            first_line(error),
        )
        return None
