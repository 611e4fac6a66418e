"""The arms of an experiment: what each of them adds to the model, and how much it trains."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fish_tuning.experiments.config.schema import (
    ORIGINAL_LORA,
    AdapterConfig,
    Criterion,
    ExperimentConfig,
    PeerConfig,
    VariantConfig,
)
from fish_tuning.experiments.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from torch.nn import Parameter
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

FISH_RANK_LORA = "LoRA (FISH rank)"
LORA_FA = "LoRA-FA"

ArmKey = tuple[str, float | None]
"""Name and ratio of an arm."""

CRITERIA: dict[str, Criterion] = {
    "LoRA-FISH": "fisher",
    "LoRA-FISH-rand": "random",
    "LoRA-FISH-rev": "reversed",
}
"""The masked arms, and what they select by."""


@dataclass(frozen=True)
class Arm:
    """One arm at one budget with one seed: one run.

    Attributes:
        name: As in the config, or the label of a variant or peer.
        ratio: Budget as a fraction of the baseline's count; None for arms without a mask.
        seed: Seed of head, adapter, data order and selection.
        digest: That of the experiment.
        peer: What a peer arm adds to the model; None for all others.
        variant: What a variant selects by and from; None for all others.
        learning_rate: Chosen or to be tried by a search; None for that of the training arguments.
        held_out: Training examples that a run of a search is evaluated on; None for all others.
    """

    name: str
    ratio: float | None
    seed: int
    digest: str
    peer: PeerConfig | None = None
    variant: VariantConfig | None = None
    learning_rate: float | None = None
    held_out: int | None = None

    @property
    def criterion(self) -> Criterion | None:
        """What a masked arm selects by; None for arms without a mask."""
        if self.variant is not None:
            return self.variant.criterion
        return None if self.peer else CRITERIA.get(self.name)

    @property
    def adapter(self) -> AdapterConfig | None:
        """Its PEFT method, where that is not the experiment's LoRA."""
        return self.peer or (self.variant.adapter if self.variant else None)

    @property
    def key(self) -> ArmKey:
        """What its counts and its learning rate depend on."""
        return self.name, self.ratio

    @property
    def run_id(self) -> str:
        """Folder name of the run. It is the same whenever the run would be the same."""
        parts = [re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") or "arm"]
        if (own := self.peer or self.variant) is not None:
            text = json.dumps(own.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
            parts.append(hashlib.sha256(text.encode()).hexdigest()[:8])
        if self.ratio is not None:
            parts.append(f"ratio{self.ratio!r}".removesuffix(".0"))
        if self.learning_rate is not None:
            parts.append(f"lr{self.learning_rate!r}")
        if self.held_out is not None:
            parts.append(f"search{self.held_out}")
        return "-".join([*parts, f"seed{self.seed}", self.digest[:12]])


@dataclass(frozen=True)
class Counts:
    """The parameters of an arm's model.

    Attributes:
        trainable: Those it trains, head included.
        total: All of them; the head, of which PEFT keeps an untrained copy, once.
    """

    trainable: int
    total: int


def planned(
    config: ExperimentConfig, learning_rates: Mapping[ArmKey, float] | None = None
) -> list[Arm]:
    """The runs of an experiment: budgets, seeds, arms. Arms without a budget run once a seed.

    Args:
        config: The experiment.
        learning_rates: What a search has chosen; arms that it has chosen nothing for are left
            out. Without it, all arms have the learning rate of the training arguments.
    """
    arms = _arms(config, config.seeds)
    if learning_rates is None:
        return arms
    return [
        replace(arm, learning_rate=learning_rates[arm.key])
        for arm in arms
        if arm.key in learning_rates
    ]


def searched(config: ExperimentConfig) -> list[Arm]:
    """The runs of the search for learning rates, in the order of the plan; none without one."""
    search = config.learning_rate_search
    if search is None:
        return []
    return [
        replace(arm, learning_rate=value, held_out=search.held_out)
        for arm in _arms(config, search.seeds)
        for value in search.values
    ]


def _arms(config: ExperimentConfig, seeds: Sequence[int]) -> list[Arm]:
    fish, digest = config.fish_tuning, config.digest()
    arms = []
    for ratio in fish.ratios:
        for seed in seeds:
            arms += [
                Arm(name, ratio if name in CRITERIA else None, seed, digest)
                for name in fish.methods_to_run
            ]
            arms += [Arm(v.name, ratio, seed, digest, variant=v) for v in fish.variants]
            arms += [Arm(peer.label, None, seed, digest, peer) for peer in config.peers]
    return list({arm.run_id: arm for arm in arms}.values())


def _baseline(config: ExperimentConfig) -> Arm:
    return Arm(ORIGINAL_LORA, None, config.seeds[0], config.digest())


def trainable_counts(config: ExperimentConfig, num_labels: int) -> dict[ArmKey, int]:
    """How many parameters each arm trains, head included, from the model's config.json alone.

    Args:
        config: The experiment.
        num_labels: The number of the head's outputs.

    Returns:
        Arm and ratio to the exact number.

    Raises:
        ConfigError: The model or an adapter cannot be built, or a budget cannot be met.
    """
    return {key: counts.trainable for key, counts in arm_counts(config, num_labels).items()}


def total_params(config: ExperimentConfig, num_labels: int) -> int:
    """All parameters of the model with the baseline's adapter.

    Raises:
        ConfigError: As in `trainable_counts`.
    """
    return _counts_of(_meta_peft_model(config, _baseline(config), num_labels)).total


def arm_counts(config: ExperimentConfig, num_labels: int) -> dict[ArmKey, Counts]:
    """As `trainable_counts`, with the total."""
    arms = {arm.key: arm for arm in planned(config)}
    baseline = _counts_of(_meta_peft_model(config, _baseline(config), num_labels))
    pools: dict[str, nn.Module] = {}  # what masked arms select from
    counts = {}
    for key, arm in arms.items():
        if arm.criterion is None:
            counts[key] = (
                baseline
                if arm.name == ORIGINAL_LORA
                else _counts_of(_meta_peft_model(config, arm, num_labels))
            )
            continue
        of = arm.name if arm.adapter else ""
        if of not in pools:
            pools[of] = _meta_peft_model(config, arm, num_labels)
        budget = _checked_budget(config, arm, baseline, pools[of])
        counts[key] = Counts(budget, _counts_of(pools[of]).total)
    return counts


def _checked_budget(config: ExperimentConfig, arm: Arm, baseline: Counts, model: nn.Module) -> int:
    """What a masked arm trains, of a model with the adapter that it selects from."""
    from fish_tuning.selection.select import pool_and_quota
    from fish_tuning.sparse.apply import check_gradients_unused

    assert arm.ratio is not None
    ratio, budget = arm.ratio, round(arm.ratio * baseline.trainable)
    entries = {name: tensor.numel() for name, tensor in trainable_tensors(model).items()}
    excluded = names_left_dense(config, entries, budget)
    if config.lora.names_to_exclude and not excluded:
        found = any(re.search(p, name) for p in config.lora.names_to_exclude for name in entries)
        logger.warning(
            "lora.names_to_exclude: %s match %s, so the head is part of what is selected from",
            config.lora.names_to_exclude,
            f"more entries than the budget of {budget:,}"
            if found
            else "none of the trained tensors",
        )
    try:
        pool, _ = pool_and_quota(entries, None, excluded, budget)
    except ValueError as error:
        key = "budgets" if config.fish_tuning.budgets else "prune_to_ratio_of_baseline"
        of = f"{arm.name}'s adapter" if arm.adapter else f"lora.fish_rank {config.lora.fish_rank}"
        raise ConfigError(
            f"fish_tuning.{key}: {ratio:g} of the baseline is {budget:,} parameters, which "
            f"{of} and lora.names_to_exclude do not allow: {error}"
        ) from None
    try:
        check_gradients_unused(model, entries, pool)
    except ValueError as error:
        raise ConfigError(f"{_place(arm)}: {error}") from None
    return budget


def _place(arm: Arm) -> str:
    """Where in the config an arm's adapter stands."""
    if arm.adapter is None:
        return "lora"
    return f"{'peers' if arm.peer else 'fish_tuning.variants'}: {arm.name}"


def names_left_dense(
    config: ExperimentConfig, entries: Mapping[str, int], budget: int
) -> list[str]:
    """The tensors that a masked arm trains whole: those of `lora.names_to_exclude`.

    None where these alone are more than the budget, such as RoBERTa's head of two layers beside
    half of a small adapter: then the head's entries compete with the adapter's.

    Args:
        config: The experiment.
        entries: Trainable tensors and their sizes.
        budget: Parameters to train in all.
    """
    names = [n for n in entries if any(re.search(p, n) for p in config.lora.names_to_exclude)]
    dense = sum(entries[name] for name in names)
    return [f"^{re.escape(name)}$" for name in names] if dense < budget else []


def add_adapter(
    model: PreTrainedModel, arm: Arm, config: ExperimentConfig, *, total_steps: int = 1
) -> nn.Module:
    """Put an arm's adapter on a model; whoever wants a certain adapter seeds torch before.

    What is trained is in float32 whatever the model is in. LoRA's alpha is twice its rank, as in
    the published experiments: the scale of its output is the same at every rank.

    Args:
        model: The model, changed in place.
        arm: The arm.
        config: The experiment.
        total_steps: Steps of the training that follows; some methods plan by it.

    Raises:
        ConfigError: PEFT refuses the method's config, or finds no module to adapt.
    """
    import torch
    from peft import get_peft_model

    settings = _peft_config(arm, config, model, total_steps)
    try:
        adapted: nn.Module = get_peft_model(model, settings)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _refused(arm, config, model, error) from error
    if arm.name == LORA_FA and arm.adapter is None:
        from fish_tuning.selection.lora import side_of

        for name, parameter in adapted.named_parameters():
            if side_of(name) == "A":
                parameter.requires_grad_(False)
    for name, parameter in trainable_tensors(adapted).items():
        if ".ranknum." in name:
            # AdaLoRA's counts of ranks. PEFT thaws them where it gives them the type of a model in
            # half precision, and the ranks would be scaled by what they are trained to.
            parameter.requires_grad_(False)
        elif parameter.dtype != torch.float32 and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    _cast_inputs_of_heads(adapted)
    return adapted


def trainable_tensors(model: nn.Module) -> dict[str, Parameter]:
    """The parameters that require gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _cast_inputs_of_heads(model: nn.Module) -> None:
    """Lets a head in float32 take what a model in half precision hands it."""
    from peft.utils import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for head in module.modules_to_save.values():
                head.register_forward_pre_hook(_in_float32)


def _in_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        value.float()
        if hasattr(value, "is_floating_point") and value.is_floating_point()
        else value
        for value in args
    )


def _meta_peft_model(config: ExperimentConfig, arm: Arm, num_labels: int) -> nn.Module:
    import torch

    from fish_tuning.experiments.models.load import meta_model

    try:
        with torch.device("meta"):
            return add_adapter(meta_model(config.model, num_labels), arm, config)
    except NotImplementedError:
        # A method that looks at values, as SHiRA at its random mask, wants memory behind them.
        empty: PreTrainedModel = meta_model(config.model, num_labels).to_empty(device="cpu")
        return add_adapter(empty, arm, config)


def _counts_of(model: nn.Module) -> Counts:
    return Counts(
        sum(tensor.numel() for tensor in trainable_tensors(model).values()),
        sum(p.numel() for name, p in model.named_parameters() if ".original_module." not in name),
    )


def _peft_config(
    arm: Arm, config: ExperimentConfig, model: PreTrainedModel, total_steps: int
) -> PeftConfig:
    from peft import LoraConfig

    if arm.adapter is not None:
        return _own_config(arm, arm.adapter, config, total_steps)
    ranks = {ORIGINAL_LORA: config.lora.baseline_rank, LORA_FA: 0}
    rank = ranks.get(arm.name, config.lora.fish_rank)
    if arm.name == LORA_FA:
        rank = _lora_fa_rank(config, model)
    return LoraConfig(
        task_type="SEQ_CLS",
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=config.lora.dropout,
        target_modules=config.lora.target_modules,
        modules_to_save=_unusual_head(model),
    )


def _unusual_head(model: PreTrainedModel) -> list[str] | None:
    """The head, where it has another name than those that PEFT knows and trains by itself."""
    outside = [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]
    known = any(name.endswith(("classifier", "score")) for name in outside)
    return None if known else outside or None


def _lora_fa_rank(config: ExperimentConfig, model: PreTrainedModel) -> int:
    """The rank at which B alone holds as nearly as possible what LoRA's A and B hold."""
    from fish_tuning.selection.lora import side_of

    sizes = {"A": 0, "B": 0, "": 0}
    adapted = _meta_peft_model(config, _baseline(config), model.config.num_labels or 2)
    for name, tensor in trainable_tensors(adapted).items():
        sizes[side_of(name)] += tensor.numel()
    return max(1, round(config.lora.baseline_rank * (sizes["A"] + sizes["B"]) / sizes["B"]))


def _own_config(
    arm: Arm, adapter: AdapterConfig, config: ExperimentConfig, total_steps: int
) -> PeftConfig:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(adapter.method)]
    fields = kind.__dataclass_fields__
    settings: dict[str, Any] = {"task_type": "SEQ_CLS", **adapter.config}
    if "target_modules" in fields and config.lora.target_modules is not None:
        settings.setdefault("target_modules", config.lora.target_modules)
    if adapter.method == "ADALORA":
        settings.setdefault("total_step", total_steps)
    unknown = sorted(set(settings) - set(fields))
    if unknown:
        raise ConfigError(
            f"{_place(arm)}: {kind.__name__} has no {unknown[0]!r}; it has "
            f"{', '.join(sorted(fields))}"
        )
    try:
        made: PeftConfig = kind(**settings)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{_place(arm)}: {kind.__name__} refuses it: {error}") from None
    return made


def _refused(
    arm: Arm, config: ExperimentConfig, model: PreTrainedModel, error: Exception
) -> ConfigError:
    key = _place(arm) if arm.adapter else "lora.target_modules"
    if "specify `target_modules`" in str(error):
        return ConfigError(
            f"{key}: PEFT has no default for models of type {model.config.model_type!r}; set "
            "lora.target_modules to names of linear modules, or to all-linear"
        )
    return ConfigError(
        f"{key}: {config.lora.target_modules!r} does not fit {config.model.name!r}: "
        f"{str(error).splitlines()[0]}"
    )
