"""Memory per device of training and scoring each arm, from the model's config.json alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fish_tuning.experiments.arms import Arm, ArmKey, planned
from fish_tuning.experiments.config.devices import Devices
from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.models.adapters import adapted_without_weights, trainable_tensors
from fish_tuning.experiments.models.counts import ParameterCounts
from fish_tuning.experiments.models.live_bytes import peak_of_step
from fish_tuning.experiments.models.load import DTYPES, HEADS
from fish_tuning.per_example.accumulate import CHUNK_ENTRIES

FLOAT32 = 4
INDEX = 4
"""Bytes of a selected entry's position."""
QUANTIZED = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}
"""Bytes per weight: bitsandbytes keeps a float32 scale for every 64 weights of 4 bits."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the highest point of training or scoring.

    Attributes:
        weights: Frozen weights and buffers, and the layers that an engine gathers.
        trained: The trained tensors, with what a mask keeps of them; with scores while scoring.
        optimizer: AdamW's two numbers for each trained parameter, and DDP's gradient buckets.
        step: Activations, gradients, loss, and whatever else a batch needs for a while.
    """

    weights: int
    trained: int
    optimizer: int
    step: int

    @property
    def total(self) -> int:
        """All of it."""
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
) -> dict[ArmKey, ArmMemory | None]:
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
        The memory by arm; None if a step of the arm's model cannot be run without numbers.

    Raises:
        ConfigError: An arm's model cannot be built.
    """
    arms = {arm.key: arm for arm in planned(config)}
    return {key: _of_arm(config, arms[key], counts[key], num_labels, devices) for key in counts}


def _of_arm(
    config: ExperimentConfig, arm: Arm, count: ParameterCounts, num_labels: int, devices: Devices
) -> ArmMemory | None:
    args, quantization = config.training_args, config.model.quantization
    model: Any = adapted_without_weights(config, arm, num_labels)
    # transformers checkpoints in training mode alone; scoring keeps it on.
    if checkpointing := bool(args.get("gradient_checkpointing")):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    dtype = DTYPES[config.model.precision]
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    trained = trainable_tensors(model)
    pool = sum(tensor.numel() for tensor in trained.values())
    gathered = _gathered_bytes(model) if devices.of_weights > 1 else 0
    held = _frozen_bytes(model, quantization) // devices.of_weights + gathered
    dequantized = _dequantized_bytes(model, quantization)

    def step(*, training: bool, autocast: torch.dtype | None = None) -> int:
        model.train(training)
        batch = functools.partial(_batch, config, num_labels)
        return dequantized + peak_of_step(model, batch, autocast=autocast)

    try:
        training = Memory(
            weights=held,
            trained=_trained_bytes(pool, count.trainable, arm.criterion is not None, devices),
            optimizer=_optimizer_bytes(count.trainable, devices),
            step=step(training=True, autocast=_autocast(args)),
        )
        if arm.criterion not in ("fisher", "reversed"):
            return ArmMemory(training, None)
        largest = max(tensor.numel() for tensor in trained.values())
        scoring = Memory(
            weights=held,
            trained=2 * FLOAT32 * pool // devices.of_weights,
            optimizer=0,
            step=step(training=checkpointing)
            + FLOAT32 * min(CHUNK_ENTRIES, _rows(config) * largest)
            + _logits_bytes(config, model, num_labels),
        )
    except RuntimeError:
        return None
    return ArmMemory(training, scoring)


def _trained_bytes(pool: int, k: int, masked: bool, devices: Devices) -> int:
    """Bytes of the parameters that are trained, and of all entries that a mask selects from.

    A masked tensor keeps its entries undivided, beside the values and their index.
    """
    values = FLOAT32 * k // devices.of_weights
    return values + (FLOAT32 * pool + INDEX * k) * masked


def _optimizer_bytes(k: int, devices: Devices) -> int:
    buckets = FLOAT32 * k if devices.engine == "ddp" and devices.count > 1 else 0
    return 2 * FLOAT32 * k // devices.of_optimizer + buckets


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


def _autocast(args: Mapping[str, object]) -> torch.dtype | None:
    if args.get("bf16"):
        return torch.bfloat16
    return torch.float16 if args.get("fp16") else None


def _rows(config: ExperimentConfig) -> int:
    rows: int = config.training_args.get("per_device_train_batch_size", 8)
    return rows


def _batch(config: ExperimentConfig, num_labels: int) -> dict[str, Tensor]:
    ids = torch.zeros(_rows(config), config.max_length, dtype=torch.long)
    if num_labels == 0:
        return {"input_ids": ids, "labels": ids}
    labels = torch.zeros(len(ids), dtype=torch.float32 if num_labels == 1 else torch.long)
    return {"input_ids": ids, "labels": labels}


def _logits_bytes(config: ExperimentConfig, model: Any, num_labels: int) -> int:
    """Bytes of a language model's logits, which scoring keeps to compare two losses."""
    if num_labels:
        return 0
    vocabulary: int = model.get_output_embeddings().out_features
    return FLOAT32 * _rows(config) * config.max_length * vocabulary
