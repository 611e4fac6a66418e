"""From an arm to the model it trains: the base model with the arm's adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.nn import Parameter
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fish_tuning.experiments.arms import LORA_FA, Arm, baseline
from fish_tuning.experiments.config.adapters import AdapterConfig
from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.config.selection import ORIGINAL_LORA
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.models.load import meta_model
from fish_tuning.names import side_of

_LINEAR = (nn.Linear, Conv1D)

SCALING = 2
"""LoRA's alpha / rank, as in the published experiments."""


def add_adapter(
    model: PreTrainedModel,
    arm: Arm,
    config: ExperimentConfig,
    *,
    total_steps: int = 1,
    ranks: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Put an arm's adapter on a model. Seed torch first for a reproducible adapter.

    An arm of the model's own weights gets no adapter: these weights are made trainable.

    Trainable parameters are float32 whatever the model's dtype is. LoRA's alpha is `SCALING` times
    its rank, so that its output has the same scale at every rank.

    Args:
        model: The model, changed in place.
        arm: The arm.
        config: The experiment.
        total_steps: Steps of the training that follows; AdaLoRA plans its ranks by it.
        ranks: The ranks of LoRA-FISH-ranks, from `choose_ranks`. Without them it gets the LoRA
            that they are chosen by.

    Raises:
        ConfigError: PEFT refuses the method's config, or a module to adapt does not exist.
    """
    if arm.own_weights is not None:
        trained = _own_weights(arm, config, model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        return model
    settings = _peft_config(arm, config, model, total_steps, ranks)
    adapted = _adapted(model, arm, config, settings)
    if arm.name == LORA_FA and arm.adapter is None:
        for name, parameter in adapted.named_parameters():
            if side_of(name) == "A":
                parameter.requires_grad_(False)
    for name, parameter in trainable_tensors(adapted).items():
        if ".ranknum." in name:
            # AdaLoRA keeps its ranks in a parameter. On a model in half precision PEFT makes it
            # trainable when it casts it, and training would change the ranks.
            parameter.requires_grad_(False)
        elif parameter.dtype != torch.float32 and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    _cast_head_inputs(adapted)
    return adapted


def adapted_without_weights(
    config: ExperimentConfig,
    arm: Arm,
    num_labels: int,
    *,
    ranks: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build an arm's model from the model's config.json alone, to look at names and shapes.

    Args:
        config: The experiment.
        arm: The arm.
        num_labels: Number of the head's outputs.
        ranks: As in `add_adapter`.

    Raises:
        ConfigError: The model or its adapter cannot be built.
    """
    try:
        with torch.device("meta"):
            return add_adapter(meta_model(config.model, num_labels), arm, config, ranks=ranks)
    except NotImplementedError:
        # Some methods look at values, as SHiRA does for its random mask, and need real memory.
        empty: PreTrainedModel = meta_model(config.model, num_labels).to_empty(device="cpu")
        empty.tie_weights()  # They were divided, and would count twice.
        return add_adapter(empty, arm, config, ranks=ranks)


def trainable_tensors(model: nn.Module) -> dict[str, Parameter]:
    """The parameters that require gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _cast_head_inputs(model: nn.Module) -> None:
    """Let a float32 head accept what a model in half precision passes to it."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for head in module.modules_to_save.values():
                head.register_forward_pre_hook(_to_float32)


def _to_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for value in args
    )


def _own_weights(arm: Arm, config: ExperimentConfig, model: PreTrainedModel) -> set[str]:
    """The names of the model's own parameters that an arm selects from.

    PEFT finds the modules and the head, as it does for LoRA.
    """
    key = f"{arm.config_key}: own_weights"
    lora = config.lora.model_copy(update={"target_modules": arm.own_weights})
    of_lora = config.model_copy(update={"lora": lora})
    try:
        adapted: Any = adapted_without_weights(
            of_lora, baseline(config), _num_labels(config, model)
        )
    except ConfigError as error:
        reasons = [problem.removeprefix("lora.target_modules: ") for problem in error.problems]
        raise ConfigError([f"{key}: {reason}" for reason in reasons]) from None
    have = dict(model.named_parameters())
    names = [f"{module}.weight" for module in adapted.targeted_module_names]
    for module, name in zip(adapted.targeted_module_names, names, strict=True):
        if name not in have or not isinstance(model.get_submodule(module), nn.Linear):
            raise ConfigError(
                f"{key}: {module} is not a linear layer with a weight of its own, the only kind "
                "whose changes can be kept as an adapter; name other modules"
            )
    head = re.compile(r"base_model\.model\.(.+)\.modules_to_save\.default(\..+)")
    return {*names, *(head.sub(r"\1\2", name) for name in trainable_tensors(adapted))} & set(have)


def _num_labels(config: ExperimentConfig, model: PreTrainedModel) -> int:
    """The number of the head's outputs; 0 for a language model, which has no new head."""
    return 0 if config.is_generative else model.config.num_labels or 2


def _peft_config(
    arm: Arm,
    config: ExperimentConfig,
    model: PreTrainedModel,
    total_steps: int,
    ranks: Mapping[str, Any] | None,
) -> PeftConfig:
    if arm.adapter is not None:
        return _own_config(arm, arm.adapter, config, total_steps)
    rank = config.lora.fish_rank
    if arm.name == ORIGINAL_LORA:
        rank = config.lora.baseline_rank
    elif arm.name == LORA_FA:
        rank = _lora_fa_rank(config, model)
    shape = ranks or {
        "r": rank,
        "lora_alpha": SCALING * rank,
        "target_modules": config.lora.target_modules,
    }
    return LoraConfig(
        task_type=_task_type(config),
        lora_dropout=config.lora.dropout,
        modules_to_save=None if config.is_generative else _unusual_head(model),
        **shape,
    )


def _task_type(config: ExperimentConfig) -> str:
    """PEFT's name of the task."""
    return "CAUSAL_LM" if config.is_generative else "SEQ_CLS"


def _unusual_head(model: PreTrainedModel) -> list[str] | None:
    """The head's modules, unless PEFT recognizes them by name and trains them anyway."""
    outside = [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]
    known = any(name.endswith(("classifier", "score")) for name in outside)
    return None if known else outside or None


def _lora_fa_rank(config: ExperimentConfig, model: PreTrainedModel) -> int:
    """The rank at which B alone has about as many entries as the baseline's A and B."""
    sizes = {"A": 0, "B": 0, "": 0}
    adapted = adapted_without_weights(config, baseline(config), _num_labels(config, model))
    for name, tensor in trainable_tensors(adapted).items():
        sizes[side_of(name)] += tensor.numel()
    return max(1, round(config.lora.baseline_rank * (sizes["A"] + sizes["B"]) / sizes["B"]))


def _own_config(
    arm: Arm, adapter: AdapterConfig, config: ExperimentConfig, total_steps: int
) -> PeftConfig:
    """The PEFT config of a peer, or of a variant with its own adapter."""
    kind: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(adapter.method)]
    fields = kind.__dataclass_fields__
    settings: dict[str, Any] = {"task_type": _task_type(config), **adapter.config}
    if "target_modules" in fields and config.lora.target_modules is not None:
        settings.setdefault("target_modules", config.lora.target_modules)
    if adapter.method == "ADALORA":
        settings.setdefault("total_step", total_steps)
    unknown = sorted(set(settings) - set(fields))
    if unknown:
        raise ConfigError(
            f"{arm.config_key}: {kind.__name__} has no {unknown[0]!r}; it has "
            f"{', '.join(sorted(fields))}"
        )
    try:
        made: PeftConfig = kind(**settings)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{arm.config_key}: {kind.__name__} refuses it: {error}") from None
    return made


def _adapted(
    model: PreTrainedModel, arm: Arm, config: ExperimentConfig, settings: PeftConfig
) -> nn.Module:
    modules = dict(model.named_modules())
    listed = getattr(settings, "target_modules", None) is not None
    try:
        adapted: nn.Module = get_peft_model(model, settings)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _refused(arm, config, settings, modules, error) from error
    # PEFT's own list for a type of models may have names that only some of them have.
    if listed and _unknown_targets(settings, modules):
        raise _refused(arm, config, settings, modules)
    return adapted


def _unknown_targets(settings: PeftConfig, modules: Iterable[str]) -> list[str]:
    """Listed target modules that do not exist. PEFT skips them as long as one other does."""
    targets = getattr(settings, "target_modules", None)
    if not isinstance(targets, (list, set)):
        return []
    return sorted(t for t in targets if not any(f".{m}".endswith(f".{t}") for m in modules))


def _refused(
    arm: Arm,
    config: ExperimentConfig,
    settings: PeftConfig,
    modules: Mapping[str, nn.Module],
    error: Exception | None = None,
) -> ConfigError:
    key = arm.config_key if arm.adapter else "lora.target_modules"
    if "specify `target_modules`" in str(error):
        kind = cast("PreTrainedModel", modules[""]).config.model_type
        return ConfigError(
            f"{key}: PEFT has no default for models of type {kind!r}; set "
            "lora.target_modules to names of linear modules, or to all-linear"
        )
    unknown = _unknown_targets(settings, modules)
    reason = str(error).splitlines()[0]
    if unknown:
        linear = {m.rpartition(".")[2] for m, of in modules.items() if isinstance(of, _LINEAR)}
        meant = get_close_matches(unknown[0], linear, n=1)
        reason = (
            f"the model has no module {' or '.join(map(repr, unknown))}"
            f"{f', did you mean {meant[0]!r}?' if meant else ''}; its linear modules are "
            f"{', '.join(sorted(linear))}"
        )
    targets = getattr(settings, "target_modules", None)
    shown = sorted(targets) if isinstance(targets, set) else targets
    return ConfigError(f"{key}: {shown!r} does not fit {config.model.name!r}: {reason}")
