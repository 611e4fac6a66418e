"""What a run leaves behind: its record, and the files that hold records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from fish_tuning.atomic import write_atomically
from fish_tuning.experiments.errors import ConfigError

FORMAT_VERSION = 1
RESULTS_FILE = "results.json"
RUNS_FOLDER = "runs"
RUN_FILE = "result.json"


class _Record(BaseModel):
    # A training that diverged has metrics that JSON has no number for.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class TensorDensity(_Record):
    """How much of one adapter tensor a mask selects."""

    name: str = Field(description="Parameter name in the PEFT model.")
    selected: int = Field(description="Entries that are trained.")
    entries: int = Field(description="Entries of the tensor.")


class ScoreHistogram(_Record):
    """The scores of one kind of tensor."""

    kind: str = Field(description="lora_A, lora_B or other.")
    zeros: int = Field(description="Entries whose score is 0.")
    log10_edges: list[float] = Field(
        description="Bin edges: log10 of the score, one more than counts."
    )
    counts: list[int] = Field(description="Entries in each bin.")


class Run(_Record):
    """One arm at one budget with one seed."""

    run_id: str = Field(description="Folder name under runs/; arm, ratio, seed and config digest.")
    arm: str = Field(description="Name of the arm, such as LoRA-FISH.")
    ratio: float | None = Field(
        description="Budget as a fraction of the baseline; null: no budget."
    )
    seed: int = Field(description="Seed of weights, data order and selection.")
    learning_rate: float | None = Field(
        default=None,
        description="Chosen or tried by the search for learning rates; null: the config's.",
    )
    held_out: int | None = Field(
        default=None,
        description="Training examples that a run of the search was evaluated on; null: the "
        "validation split.",
    )
    status: Literal["finished", "failed"] = Field(description="How the run ended.")
    error: str | None = Field(default=None, description="Why a failed run failed.")
    config: dict[str, Any] = Field(description="The resolved experiment config.")
    budget: int | None = Field(
        default=None, description="Parameters the arm was to train, head included."
    )
    trainable_params: int | None = Field(default=None, description="Scalars the optimizer held.")
    changed_params: int | None = Field(
        default=None, description="Scalars that differ from the start when training ended."
    )
    total_params: int | None = Field(
        default=None, description="All parameters of the model, adapter included."
    )
    main_metric: str | None = Field(default=None, description="The metric that reports compare.")
    metrics: dict[str, float] = Field(
        default={}, description="Metrics of the model that was kept, and eval_loss."
    )
    curve: list[dict[str, float]] = Field(
        default=[], description="Metrics by step: step, epoch, eval_loss, metrics."
    )
    train_curve: list[dict[str, float]] = Field(
        default=[], description="Training loss by step: step, loss."
    )
    train_seconds: float | None = Field(
        default=None, description="Training without evaluation, saving, scoring."
    )
    score_seconds: float | None = Field(
        default=None, description="Scoring and selecting; 0 for unmasked arms."
    )
    peak_memory_bytes: int | None = Field(
        default=None, description="Highest memory during training."
    )
    peak_memory_of: str | None = Field(
        default=None, description="What that is measured on: process or cuda:0."
    )
    adapter_bytes: int | None = Field(
        default=None, description="Size of the adapter's weight file."
    )
    adapter: str | None = Field(
        default=None, description="Folder of adapter and mask, relative to results.json."
    )
    mask_density: list[TensorDensity] = Field(
        default=[], description="By adapter tensor; empty for unmasked arms."
    )
    score_histograms: list[ScoreHistogram] = Field(
        default=[], description="Distribution of the Fisher scores."
    )
    versions: dict[str, str] = Field(default={}, description="Python and packages.")
    commit: str | None = Field(
        default=None, description="Git commit of the working folder, -dirty if changed."
    )
    hardware: dict[str, Any] = Field(
        default={}, description="Processor, memory, accelerator, system."
    )
    started_at: str = Field(description="UTC, ISO 8601.")
    finished_at: str = Field(description="UTC, ISO 8601.")


class Results(_Record):
    """All runs of a sweep."""

    format_version: Annotated[int, Field(description="Version of this format.")] = FORMAT_VERSION
    name: str = Field(description="Name of the experiment: the config file's stem.")
    config: dict[str, Any] = Field(description="The resolved config of the sweep.")
    runs: list[Run] = Field(description="In the order of the plan: budgets, seeds, arms.")
    search: list[Run] = Field(
        default=[],
        description="The runs that chose the learning rates; evaluated on examples held out of "
        "the training data.",
    )


def write_json(path: Path, record: BaseModel) -> None:
    """Writes a record whole or not at all; an earlier file stays until then."""
    write_atomically(path, (record.model_dump_json(indent=2) + "\n").encode())


def read_results(path: Path) -> Results:
    """Reads a `results.json`, or the one in a folder.

    Raises:
        ConfigError: There is none, it is damaged, or it is of another format version.
    """
    path = path / RESULTS_FILE if path.is_dir() else path
    return _read(path, Results)


def read_run(path: Path) -> Run:
    """Reads the record of one run.

    Raises:
        ConfigError: As in `read_results`.
    """
    return _read(path, Run)


R = TypeVar("R", Results, Run)


def _read(path: Path, kind: type[R]) -> R:
    try:
        # Stricter than json: what it accepts, a lone surrogate say, can be written again.
        content = from_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); name a results folder"
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"{path}: is not whole JSON ({error}); run the experiment again"
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
            f"{path}: {where}: {error.errors()[0]['msg']}; it is damaged or no results file"
        ) from None
