"""The record of a run, and the JSON files that hold records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from fish_tuning.atomic import write_atomically
from fish_tuning.experiments.errors import ConfigError

if TYPE_CHECKING:
    from fish_tuning.mask import FishMask

FORMAT_VERSION = 1
RESULTS_FILE = "results.json"
RUNS_FOLDER = "runs"
RUN_FILE = "result.json"


class _Record(BaseModel):
    # The metrics of a run that diverged are NaN or infinite, which JSON numbers cannot be.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class TensorDensity(_Record):
    """How many entries of one tensor a mask selects."""

    name: str = Field(description="Parameter name in the PEFT model.")
    selected: int = Field(description="Number of entries that are trained.")
    entries: int = Field(description="Number of entries in the tensor.")


def tensor_densities(mask: FishMask) -> list[TensorDensity]:
    """Count the selected and all entries of each of a mask's tensors."""
    return [
        TensorDensity(name=name, selected=int(bits.count_nonzero()), entries=bits.numel())
        for name, bits in mask.items()
    ]


class ScoreHistogram(_Record):
    """Distribution of the scores of one kind of tensor."""

    kind: str = Field(description="lora_A, lora_B or other.")
    zeros: int = Field(description="Number of entries whose score is 0.")
    log10_edges: list[float] = Field(
        description="Bin edges, as log10 of the score; one more than counts."
    )
    counts: list[int] = Field(description="Number of entries in each bin.")


class GeneratedExample(_Record):
    """What a run's model generates from one prompt."""

    prompt: str = Field(description="The prompt; of a chat, in the model's template.")
    references: list[str] = Field(description="The completions that the data has for it.")
    before: str = Field(description="The text generated before training.")
    after: str = Field(description="The text generated after training.")


class Evaluated(_Record):
    """Which weights a run's final metrics are of."""

    step: int = Field(description="The training step after which they were saved or kept.")
    best_by: str | None = Field(
        description="The metric by which this checkpoint was the best; null for the last step's "
        "weights."
    )


class Run(_Record):
    """One arm at one budget with one seed."""

    run_id: str = Field(
        description="Folder name under runs/, made of arm, ratio, seed and config digest."
    )
    arm: str = Field(description="Name of the arm, such as LoRA-FISH.")
    ratio: float | None = Field(
        description="Budget as a fraction of the baseline's count; null for arms without a budget."
    )
    seed: int = Field(description="Seed of weights, data order and selection.")
    learning_rate: float | None = Field(
        default=None,
        description="The arm's own rate, or the one that the search chose or tried; null if that "
        "of the training arguments was used.",
    )
    held_out: int | None = Field(
        default=None,
        description="In a run of the search, the number of training examples it was evaluated on; "
        "null if it was the validation split.",
    )
    status: Literal["finished", "failed"] = Field(description="How the run ended.")
    error: str | None = Field(default=None, description="Why a failed run failed.")
    config: dict[str, Any] = Field(description="The resolved experiment config.")
    budget: int | None = Field(
        default=None, description="Number of parameters the arm had to train, head included."
    )
    trainable_params: int | None = Field(
        default=None, description="Number of scalars the optimizer held."
    )
    changed_params: int | None = Field(
        default=None,
        description="Number of scalars that differed from the start when training ended.",
    )
    total_params: int | None = Field(
        default=None, description="Number of all parameters of the model, adapter included."
    )
    main_metric: str | None = Field(default=None, description="The metric that reports compare.")
    metrics: dict[str, float] = Field(
        default={}, description="eval_loss and metrics of the final model."
    )
    metrics_before: dict[str, float] = Field(
        default={}, description="Language models: the same before training."
    )
    example: GeneratedExample | None = Field(
        default=None,
        description="Language models: one generated text; generations.jsonl beside result.json "
        "has all of them.",
    )
    evaluated: Evaluated | None = Field(
        default=None, description="Which weights the metrics are of: those of a step."
    )
    curve: list[dict[str, float]] = Field(
        default=[], description="One entry per evaluation: step, epoch, eval_loss and metrics."
    )
    train_curve: list[dict[str, float]] = Field(
        default=[], description="One entry per log step: step and training loss."
    )
    train_seconds: float | None = Field(
        default=None, description="Seconds of training, without evaluation, saving and scoring."
    )
    score_seconds: float | None = Field(
        default=None,
        description="Seconds of scoring and selecting; 0 for arms that are not scored.",
    )
    peak_memory_bytes: int | None = Field(
        default=None, description="Peak memory during training, in bytes."
    )
    peak_memory_of: str | None = Field(
        default=None, description="Where peak memory was measured: process or cuda:0."
    )
    adapter_bytes: int | None = Field(
        default=None, description="Size of the adapter's weight file, in bytes."
    )
    adapter: str | None = Field(
        default=None, description="Folder of the adapter and its mask, relative to results.json."
    )
    mask_density: list[TensorDensity] = Field(
        default=[],
        description="One entry per tensor of adapter and head; empty for arms without a mask.",
    )
    score_histograms: list[ScoreHistogram] = Field(
        default=[], description="Distribution of the Fisher scores, by kind of tensor."
    )
    versions: dict[str, str] = Field(default={}, description="Versions of Python and packages.")
    commit: str | None = Field(
        default=None, description="Git commit of the working folder, -dirty if changed."
    )
    hardware: dict[str, Any] = Field(
        default={}, description="Processor, memory, accelerator, system."
    )
    started_at: str = Field(description="Start time in UTC, ISO 8601.")
    finished_at: str = Field(description="End time in UTC, ISO 8601.")


class Results(_Record):
    """All runs of a sweep."""

    format_version: Annotated[int, Field(description="Version of this format.")] = FORMAT_VERSION
    name: str = Field(description="Name of the experiment: the config file's stem.")
    config: dict[str, Any] = Field(description="The resolved config of the sweep.")
    runs: list[Run] = Field(description="The runs, by budget, then seed, then arm.")
    search: list[Run] = Field(
        default=[],
        description="The runs that chose the learning rates, evaluated on examples held out of the "
        "training data.",
    )


def write_json(path: Path, record: BaseModel) -> None:
    """Write a record atomically: an earlier file stays until the new one is complete."""
    write_atomically(path, (record.model_dump_json(indent=2) + "\n").encode())


def read_results(path: Path) -> Results:
    """Read a `results.json`, given its path or its folder.

    Raises:
        ConfigError: The file is missing, damaged, or of another format version.
    """
    path = path / RESULTS_FILE if path.is_dir() else path
    return _read(path, Results)


def read_run(path: Path) -> Run:
    """Read the record of one run.

    Raises:
        ConfigError: The file is missing, damaged, or of another format version.
    """
    return _read(path, Run)


R = TypeVar("R", Results, Run)


def _read(path: Path, kind: type[R]) -> R:
    try:
        # Stricter than json.loads: it refuses what could not be written again, such as half of a
        # surrogate pair.
        content = from_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); name a results folder"
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"{path}: is not complete JSON ({error}); run the experiment again"
        ) from None
    version = FORMAT_VERSION
    if isinstance(content, dict):
        version = content.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{path}: has format_version {version!r}, this version of fish-tuning reads "
            f"{FORMAT_VERSION}; rebuild it with the version that wrote it"
        )
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) or "its content"
        raise ConfigError(
            f"{path}: {where}: {error.errors()[0]['msg']}; it is damaged or not a results file"
        ) from None
