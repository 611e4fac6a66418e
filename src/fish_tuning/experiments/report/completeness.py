"""Which runs of a sweep are missing or have failed."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from fish_tuning.experiments.arms import Arm, planned, searched
from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.results import Results, Run


@dataclass(frozen=True)
class Completeness:
    """What became of the runs that a sweep's config asks for.

    Attributes:
        failed: The runs that failed, those of a search included.
        missing: Titles of the runs that have no record; empty if the config cannot be read.
        total: Number of all runs.
    """

    failed: tuple[Run, ...]
    missing: tuple[str, ...]
    total: int

    def __bool__(self) -> bool:
        """Whether all runs are there and none has failed."""
        return not self.failed and not self.missing

    @property
    def sentence(self) -> str:
        """One sentence about what is not there; empty for a complete sweep."""
        parts = [f"{len(self.failed)} failed"] * bool(self.failed)
        if self.missing:
            verb = "has" if len(self.missing) == 1 else "have"
            parts.append(f"{len(self.missing)} {verb} not run yet")
        if not parts:
            return ""
        return (
            f"Incomplete: of {self.total} runs, {' and '.join(parts)}. What follows is about the "
            "runs that finished; run the same command again for the others."
        )


def config_of(results: Results) -> ExperimentConfig | None:
    """Return a sweep's config; None if it is incomplete or of another version of the library."""
    if "seeds" not in results.config:
        return None
    try:
        return ExperimentConfig.model_validate(results.config)
    except ValidationError:
        return None


def completeness(results: Results) -> Completeness:
    """Compare the records of a sweep with the runs that its config asks for."""
    runs = [*results.search, *results.runs]
    config = config_of(results)
    missing = []
    if config is not None:
        recorded = {_key(run) for run in runs}
        arms = [*searched(config), *planned(config)]
        missing = [arm.title for arm in arms if _key(arm) not in recorded]
    failed = tuple(run for run in runs if run.status == "failed")
    return Completeness(failed, tuple(missing), len(runs) + len(missing))


def _key(run: Run | Arm) -> tuple[object, ...]:
    # Which rate a run of the plan has is known only when the search has ended.
    rate = None if run.held_out is None else run.learning_rate
    name = run.arm if isinstance(run, Run) else run.name
    return name, run.ratio, run.seed, run.held_out, rate
