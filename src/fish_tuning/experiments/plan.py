"""What an experiment would do: budgets, exact counts, steps. No weights, no training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table as TerminalTable

from fish_tuning.experiments.arms import ArmKey, searched
from fish_tuning.experiments.config.devices import Devices
from fish_tuning.experiments.config.selection import ORIGINAL_LORA
from fish_tuning.experiments.memory.estimate import ArmMemory, Memory, estimate_memory
from fish_tuning.experiments.models.counts import count_parameters
from fish_tuning.experiments.models.load import check_length
from fish_tuning.experiments.runs.preflight import CheckedExperiment, check_packages
from fish_tuning.experiments.tables import MISSING, Table


@dataclass(frozen=True)
class PlannedArm:
    """One arm at one budget.

    Attributes:
        name: Name in the results.
        ratio: Budget as a fraction of the baseline's count; None for arms without a budget.
        trainable: Number of trainable parameters, head included.
        total: Number of all parameters, adapter and head included.
    """

    name: str
    ratio: float | None
    trainable: int
    total: int


Column = Callable[[PlannedArm], str]
"""What a column of a table shows of an arm."""


@dataclass(frozen=True)
class ExperimentPlan:
    """What an experiment would do.

    Attributes:
        model: Name of the model.
        num_labels: Number of the model's outputs; 0 for a language model.
        arms: Every arm at every budget.
        seeds: Each arm runs once with each seed.
        search_runs: Number of runs that choose the learning rates first.
        train_examples: Number of training examples; None if unknown.
        at_most: Whether that number is only an upper bound.
        examples_note: Why the number is unknown, if it is.
        steps: Optimizer steps per run on one device; None if they depend on an unknown number of
            examples.
        output_dir: Folder of the results.
        devices: The devices whose memory is estimated; None if it is not.
        memory: The memory of every arm at every budget.
    """

    model: str
    num_labels: int
    arms: tuple[PlannedArm, ...]
    seeds: tuple[int, ...]
    search_runs: int
    train_examples: int | None
    at_most: bool
    examples_note: str
    steps: int | None
    output_dir: str
    devices: Devices | None = None
    memory: Mapping[ArmKey, ArmMemory] = field(default_factory=dict)

    @property
    def num_runs(self) -> int:
        """Number of runs, those of a search for learning rates included."""
        return len(self.arms) * len(self.seeds) + self.search_runs

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render a list of facts and a table of the arms."""
        yield self._rendered()
        if self.devices is not None:
            yield f"GiB on {self.devices}, at the highest point"
            yield self._memory_table().terminal()

    def _rendered(self) -> RenderableType:
        facts = TerminalTable.grid(padding=(0, 2))
        for name, value in self._facts():
            facts.add_row(name, value)
        baseline = next((a.trainable for a in self.arms if a.name == ORIGINAL_LORA), None)
        columns: dict[str, Column] = {
            "arm": lambda arm: arm.name,
            "budget": lambda arm: "" if arm.ratio is None else f"{arm.ratio:g}",
            "trainable": lambda arm: f"{arm.trainable:,}",
            "total": lambda arm: f"{arm.total:,}",
            "share": lambda arm: f"{arm.trainable / arm.total:.4%}",
            "of LoRA": lambda arm: "" if baseline is None else f"{arm.trainable / baseline:.4g}",
        }
        return Group(facts, Table.of(self.arms, columns).terminal())

    def _memory_table(self) -> Table:
        def gib(part: Callable[[Memory], int | None], of: str = "training") -> Column:
            def show(arm: PlannedArm) -> str:
                memory: Memory | None = getattr(self.memory[arm.name, arm.ratio], of)
                if memory is None:
                    return ""
                return MISSING if (count := part(memory)) is None else f"{count / 2**30:.2f}"

            return show

        columns: dict[str, Column] = {
            "arm": lambda arm: arm.name if arm.ratio is None else f"{arm.name} {arm.ratio:g}",
            "weights": gib(lambda memory: memory.weights),
            "trained": gib(lambda memory: memory.trained),
            "optimizer": gib(lambda memory: memory.optimizer),
            "step": gib(lambda memory: memory.step),
            "training": gib(lambda memory: memory.total),
            "scoring": gib(lambda memory: memory.total, "scoring"),
        }
        return Table.of(self.arms, columns)

    def _facts(self) -> Iterator[tuple[str, str]]:
        outputs = f"{self.num_labels} outputs" if self.num_labels else "a language model"
        yield "model", f"{self.model}, {outputs}"
        bound = "at most " if self.at_most else ""
        if self.train_examples is None:
            yield "training examples", f"unknown: {self.examples_note}"
        else:
            yield "training examples", f"{bound}{self.train_examples:,}"
        if self.steps is None:
            yield "optimizer steps", "unknown, as they depend on the number of examples"
        else:
            yield "optimizer steps", f"{bound}{self.steps:,} per run, on one device"
        seeds = f"seed{'s' * (len(self.seeds) > 1)} {', '.join(map(str, self.seeds))}"
        search = f", after {self.search_runs} that choose learning rates" * bool(self.search_runs)
        yield "runs", f"{self.num_runs}: {len(self.arms)} arms, each with {seeds}{search}"
        yield "results", self.output_dir


def plan_experiment(checked: CheckedExperiment, devices: Devices | None = None) -> ExperimentPlan:
    """Work out what an experiment would do, from the model's config.json alone.

    Args:
        checked: The experiment, from `check_experiment(config, to_train=False)`.
        devices: The devices whose memory to estimate; by default it is not.

    Raises:
        ConfigError: The model's config cannot be loaded, inputs are too long for it, the modules
            to adapt are not in it, or a budget cannot be met.
    """
    config, data = checked.config, checked.data
    num_labels = config.dataset.known_num_labels if data is None else data.num_labels
    examples = config.dataset.max_train_samples if data is None else len(data.train)
    assert num_labels is not None
    check_length(config.model, config.max_length)
    if devices is not None:
        check_packages(config)  # The estimate runs a step of TRL's Trainer.
    counts = count_parameters(config, num_labels)
    source = "the hub" if config.dataset.load_args else "the installed packages"
    return ExperimentPlan(
        model=config.model.name,
        num_labels=num_labels,
        arms=tuple(PlannedArm(*arm, count.trainable, count.total) for arm, count in counts.items()),
        seeds=tuple(config.seeds),
        search_runs=len(searched(config)),
        train_examples=examples,
        at_most=data is None and examples is not None,
        examples_note=checked.data_problem or f"the data of {source} is not read for a plan",
        steps=optimizer_steps(config.training_args, examples),
        output_dir=config.training.output_dir,
        devices=devices,
        memory=estimate_memory(config, counts, num_labels, devices) if devices else {},
    )


def optimizer_steps(args: Mapping[str, Any], examples: int | None) -> int | None:
    """Count the optimizer steps of a run on one device, as transformers' Trainer does.

    Args:
        args: Training arguments.
        examples: Number of training examples; None if unknown.

    Returns:
        The steps; None if they depend on an unknown number of examples, or on how examples are
        packed.
    """
    max_steps: int = args.get("max_steps", -1)
    if max_steps > 0:
        return max_steps
    if examples is None or args.get("packing"):
        return None
    batch_size: int = args.get("per_device_train_batch_size", 8)
    accumulated: int = args.get("gradient_accumulation_steps", 1)
    epochs: float = args.get("num_train_epochs", 3.0)
    dropped = args.get("dataloader_drop_last", False)
    batches = examples // batch_size if dropped else math.ceil(examples / batch_size)
    return math.ceil(max(1, math.ceil(batches / accumulated)) * epochs)
