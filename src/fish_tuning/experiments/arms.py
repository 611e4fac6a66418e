"""The runs of an experiment: which arms, at which budgets, with which seeds."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fish_tuning.config import Criterion
from fish_tuning.experiments.config.adapters import AdapterConfig, PeerConfig
from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.config.selection import FISH_RANKS, ORIGINAL_LORA, VariantConfig

LORA_FA = "LoRA-FA"

ArmKey = tuple[str, float | None]
"""Name and budget ratio of an arm."""

CRITERIA: dict[str, Criterion] = {
    "LoRA-FISH": "fisher",
    "LoRA-FISH-rand": "random",
    "LoRA-FISH-rev": "reversed",
}
"""The criterion of each masked arm that has a fixed name."""


@dataclass(frozen=True)
class Arm:
    """One arm at one budget with one seed, which is one run.

    Attributes:
        name: The name in the config, or the label of a variant or peer.
        ratio: Budget as a fraction of the baseline's count; None for arms without a budget.
        seed: Seed of head, adapter, data order and selection.
        digest: The experiment's digest.
        peer: The PEFT method of a peer arm; None for all other arms.
        variant: The selection rule and adapter of a variant; None for all other arms.
        learning_rate: The arm's own rate, or the one that a search chose or tries; None to use
            the training arguments'.
        held_out: In a run of a search, the number of training examples held out to evaluate on;
            None for all other runs.
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
        """How a masked arm ranks entries; None for arms without a mask."""
        if self.variant is not None:
            return self.variant.criterion
        return None if self.peer else CRITERIA.get(self.name)

    @property
    def chooses_ranks(self) -> bool:
        """Whether it trains a LoRA whose ranks Fisher information chooses."""
        return self.name == FISH_RANKS and not (self.peer or self.variant)

    @property
    def adapter(self) -> AdapterConfig | None:
        """The PEFT method, if it is not the experiment's LoRA."""
        return self.peer or (self.variant.adapter if self.variant else None)

    @property
    def own_weights(self) -> list[str] | str | None:
        """The modules whose own weights the arm selects from, in place of an adapter's."""
        return self.variant.own_weights if self.variant else None

    @property
    def has_own_pool(self) -> bool:
        """Whether the arm trains or selects from something else than the experiment's LoRA."""
        return self.adapter is not None or self.own_weights is not None

    @property
    def key(self) -> ArmKey:
        """What the arm's counts and its learning rate depend on."""
        return self.name, self.ratio

    @property
    def config_key(self) -> str:
        """Where the config describes what the arm trains or selects from."""
        if not self.has_own_pool:
            return "lora"
        return f"{'peers' if self.peer else 'fish_tuning.variants'}: {self.name}"

    @property
    def title(self) -> str:
        """The run's name on the terminal."""
        ratio = "" if self.ratio is None else f" {self.ratio:g}"
        title = f"{self.name}{ratio}, seed {self.seed}"
        return title if self.held_out is None else f"{title}, learning rate {self.learning_rate:g}"

    @property
    def run_id(self) -> str:
        """Name of the run's folder. Runs that would give the same result share it."""
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


def planned(
    config: ExperimentConfig, learning_rates: Mapping[ArmKey, float] | None = None
) -> list[Arm]:
    """List the runs of an experiment, by budget, then seed, then arm.

    Arms without a budget run once per seed.

    Args:
        config: The experiment.
        learning_rates: The rates that a search chose; arms that have neither one of these nor one
            of their own are left out. Without this argument, arms without a rate of their own use
            that of the training arguments.
    """
    own = {arm: one for arm, one in config.learning_rates.items() if not isinstance(one, list)}
    return [
        replace(arm, learning_rate=own.get(arm.name) or (learning_rates or {}).get(arm.key))
        for arm in _arms(config, config.seeds)
        if learning_rates is None or arm.name in own or arm.key in learning_rates
    ]


def searched(config: ExperimentConfig) -> list[Arm]:
    """List the runs of the search for learning rates; empty if the experiment has no search."""
    search = config.learning_rate_search
    if search is None:
        return []
    return [
        replace(arm, learning_rate=value, held_out=search.held_out)
        for arm in _arms(config, search.seeds)
        if isinstance(values := config.learning_rates.get(arm.name, search.values), list)
        for value in values
    ]


def baseline(config: ExperimentConfig) -> Arm:
    """The LoRA whose number of trainable parameters is the unit of all budgets."""
    return Arm(ORIGINAL_LORA, None, config.seeds[0], config.digest())


def _arms(config: ExperimentConfig, seeds: Sequence[int]) -> list[Arm]:
    fish, digest = config.fish_tuning, config.digest()
    arms = []
    for ratio in fish.ratios:
        for seed in seeds:
            arms += [
                Arm(name, ratio if name in {*CRITERIA, FISH_RANKS} else None, seed, digest)
                for name in fish.methods_to_run
            ]
            arms += [Arm(v.name, ratio, seed, digest, variant=v) for v in fish.variants]
            arms += [Arm(peer.label, None, seed, digest, peer) for peer in config.peers]
    return list({arm.run_id: arm for arm in arms}.values())
