"""The section `fish_tuning`: which arms run, and how the masked ones select."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from fish_tuning.config import Criterion, FishConfig, ScoringPoint, SelectionSettings
from fish_tuning.experiments.config.adapters import AdapterConfig
from fish_tuning.experiments.config.sections import Section
from fish_tuning.experiments.config.values import Positive, Ratio, Seed, Text, distinct

ORIGINAL_LORA = "Original LoRA"
FISH_RANKS = "LoRA-FISH-ranks"
Method = Literal[
    "Original LoRA",
    "LoRA-FISH",
    "LoRA-FISH-rand",
    "LoRA-FISH-rev",
    "LoRA-FISH-ranks",
    "LoRA (FISH rank)",
    "LoRA-FA",
]
DEFAULT_METHODS: list[Method] = [
    "Original LoRA",
    "LoRA-FISH",
    "LoRA-FISH-rand",
    "LoRA-FISH-rev",
]
_SHORT_METHODS = {"fish": "LoRA-FISH", "rand": "LoRA-FISH-rand", "rev": "LoRA-FISH-rev"}


def _full_methods(value: Any) -> Any:
    """Expand the original work's short names, which always ran the baseline too."""
    if not isinstance(value, list) or any(not isinstance(name, str) for name in value):
        return value
    names = [_SHORT_METHODS.get(name, name) for name in value]
    short = names != value or not value
    return [ORIGINAL_LORA, *names] if short and ORIGINAL_LORA not in names else names


class SelectionRule(SelectionSettings, Section):
    """How the entries of masked arms are scored and selected."""

    scoring_point: Literal[ScoringPoint, "warmup"] = Field(
        default="perturbed",
        description="Where Fisher information is computed: at the adapter's start, where A scores "
        "0 (start); there, but with a small random B (perturbed); or after warm-up steps that are "
        "then undone (warmup).",
    )
    warmup_steps: Positive = Field(
        default=32, description="Training steps before scoring, with scoring_point: warmup."
    )

    def fish_config(
        self,
        criterion: Criterion,
        *,
        num_trainable: int,
        names_to_exclude: Sequence[str],
        seed: int,
    ) -> FishConfig:
        """The settings of one selection. After a warm-up, the model is scored as it is then."""
        shared = {name: getattr(self, name) for name in SelectionSettings.model_fields}
        return FishConfig(
            **shared,
            criterion=criterion,
            scoring_point="start" if self.scoring_point == "warmup" else self.scoring_point,
            num_trainable=num_trainable,
            names_to_exclude=tuple(names_to_exclude),
            seed=seed,
        )


class VariantConfig(Section):
    """A further masked arm: another rule, criterion, or pool to select from."""

    name: Text = Field(description="Name in the results.")
    criterion: Criterion = Field(
        default="fisher",
        description="What entries are ranked by: high Fisher information as in LoRA-FISH (fisher), "
        "low as in LoRA-FISH-rev (reversed), random numbers as in LoRA-FISH-rand (random), or the "
        "magnitude of the weights (magnitude).",
    )
    rule: dict[str, Any] = Field(
        default={},
        description="What differs from fish_tuning's own rule, of: "
        f"{', '.join(SelectionRule.model_fields)}.",
    )
    adapter: AdapterConfig | None = Field(
        default=None, description="What it selects from; by default LoRA of lora.fish_rank."
    )
    own_weights: list[str] | str | None = Field(
        default=None,
        description="Select from the model's own weights in place of an adapter: names of modules, "
        "or one string that is a regular expression or `all-linear`. Their weight matrices, and a "
        "new head.",
    )


class FishTuningConfig(SelectionRule):
    """Which arms run, and how entries are scored and selected."""

    methods_to_run: Annotated[
        list[Method], BeforeValidator(_full_methods), AfterValidator(distinct)
    ] = Field(
        default=DEFAULT_METHODS,
        description="The arms. LoRA-FISH-ranks is an ordinary LoRA, with a rank for each module "
        "chosen by Fisher information. The original work's names fish, rand and rev are accepted "
        "too; with them, or with an empty list, Original LoRA is added.",
    )
    prune_to_ratio_of_baseline: Ratio = Field(
        default=1.0,
        description="Trainable parameters of the masked arms and of LoRA-FISH-ranks, head "
        "included, as a fraction of the baseline's.",
    )
    budgets: Annotated[list[Ratio], Field(min_length=1), AfterValidator(distinct)] | None = Field(
        default=None,
        description="Several such fractions, each with its own masked arms, in place of "
        "prune_to_ratio_of_baseline.",
    )
    seed: Seed | None = Field(
        default=None,
        description="Seed of the calibration sample and of random masks; by default the run's.",
    )
    variants: list[VariantConfig] = Field(
        default=[], description="Further masked arms, with another rule, criterion or pool."
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Variants that change nothing or whose rule is wrong, and ranks that cannot be chosen."""
        if FISH_RANKS in self.methods_to_run and self.scoring_point != "perturbed":
            yield (
                "scoring_point",
                f"{self.scoring_point!r} gives no scores to choose ranks by; use perturbed, or "
                f"remove {FISH_RANKS} from methods_to_run",
            )
        for position, variant in enumerate(self.variants):
            here = f"variants[{position}]"
            if variant == VariantConfig(name=variant.name):
                yield (
                    here,
                    f"{variant.name!r} changes nothing; give it a rule, an adapter or a criterion",
                )
            if variant.adapter is not None and variant.own_weights is not None:
                yield f"{here}.own_weights", "is given beside adapter; keep one"
            try:
                self.rule_of(variant)
            except ValidationError as error:
                for problem in error.errors():
                    path = ".".join(map(str, ("rule", *problem["loc"])))
                    yield f"{here}.{path}", problem["msg"]

    def rule_of(self, variant: VariantConfig | None) -> SelectionRule:
        """The rule that a masked arm selects by: this one, or a variant's."""
        own = {name: getattr(self, name) for name in SelectionRule.model_fields}
        return SelectionRule.model_validate(own | (variant.rule if variant else {}))

    @property
    def ratios(self) -> list[float]:
        """The budgets of the masked arms, as fractions of the baseline's count."""
        return self.budgets or [self.prune_to_ratio_of_baseline]
