"""Fill the tables and the figure of docs/study/README.md from the runs in docs/study/runs/.

`python scripts/study_page.py --take results/studies/sst2` first copies a sweep's `results.csv`
there. Without `--take` the tables are made anew from what is there: the same runs, the same page.
"""

import argparse
import csv
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

from fish_tuning.experiments.comparison import format_spread
from fish_tuning.experiments.report import csv_table
from fish_tuning.experiments.results import Results, Run, read_results
from fish_tuning.experiments.search import chosen_learning_rates
from fish_tuning.experiments.statistics import (
    Difference,
    Group,
    group_runs,
    paired_difference,
    pooled_difference,
    spread,
)
from fish_tuning.experiments.svg import TEXT, figure_style

STUDY = Path(__file__).parents[1] / "docs" / "study"
TASKS = ("sst2", "text")
SMALL = 0.1
"""Budgets below this share of LoRA's size are the small one, whose share differs by the head."""
COMPARISONS = (
    ("LoRA-FISH (100%)", "Original LoRA"),
    ("LoRA-FISH (50%)", "Original LoRA"),
    ("LoRA-FISH (25%)", "Original LoRA"),
    ("FISH by features (small)", "LoRA r=1, values"),
    ("FISH by features (small)", "LoRA r=2, last layer"),
    ("LoRA-FISH (100%)", "LoRA-FISH-rand (100%)"),
    ("LoRA-FISH-rand (100%)", "LoRA-FISH-rev (100%)"),
    ("FISH by features (small)", "LoRA-FISH-rand (small)"),
    ("FISH by features (small)", "LoRA-FISH (small)"),
)
CANDIDATES: tuple[tuple[str, str, Mapping[str, str]], ...] = (
    (
        "25%",
        "candidates_quarter",
        {
            "Original LoRA": "",
            "LoRA-FISH": "balanced",
            "LoRA-FISH-rand": "random, balanced",
        },
    ),
    ("25%", "sst2", {"Original LoRA": "", "LoRA-FISH": "features"}),
    (
        "small",
        "candidates_small",
        {"LoRA-FISH": "balanced", "LoRA-FISH-rand": "random, balanced"},
    ),
    (
        "small",
        "sst2_small",
        {
            "LoRA-FISH": "",
            "LoRA-FISH-rand": "random, equal shares",
            "FISH by features": "features",
        },
    ),
)
"""Budget, sweep, and what its arms are called in the table of rules; "" leaves one out."""
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def main() -> None:
    """Take sweeps, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--take", type=Path, nargs="*", default=[], help="folders of sweeps")
    for folder in parser.parse_args().take:
        results = read_results(folder)
        (STUDY / "runs" / f"{results.name}.csv").write_text(csv_table([results]), encoding="utf-8")
    page = STUDY / "README.md"
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    figure = differences_figure(pooled_differences())
    with figure_style():
        figure.savefig(STUDY / "differences.svg", metadata={"Date": None})


def filled(text: str) -> str:
    """The page with every table between its markers made anew."""
    tables = {
        "pooled": pooled_table(),
        "candidates": candidates_table(),
        **{name: task_table(name) for name in TASKS},
    }

    def replace(match: re.Match[str]) -> str:
        headers, rows = tables[match[1]]
        lines = [headers, ("---", *["---:"] * (len(headers) - 1)), *rows]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return f"<!-- table: {match[1]} -->\n\n{table}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", replace, text, flags=re.DOTALL)


def runs_of(name: str, *, exactly: bool = False) -> Results:
    """What was taken of the sweep `name`, and unless `exactly` of those called `name_...`."""
    runs: list[Run] = []
    for file in sorted((STUDY / "runs").glob("*.csv")):
        if file.stem == name or (file.stem.startswith(f"{name}_") and not exactly):
            with file.open(encoding="utf-8", newline="") as stream:
                runs += map(_run, csv.DictReader(stream))
    return Results(
        name=name,
        config={},
        runs=[run for run in runs if run.held_out is None],
        search=[run for run in runs if run.held_out is not None],
    )


def _run(row: Mapping[str, str]) -> Run:
    known = {name: row[name] for name in row.keys() & Run.model_fields.keys() if row[name]}
    metrics = {
        name.removeprefix("metrics."): float(value)
        for name, value in row.items()
        if name.startswith("metrics.") and value
    }
    return Run.model_validate({"ratio": None, **known, "config": {}, "metrics": metrics})


def labelled(results: Results) -> dict[str, Group]:
    """Its groups by label, in which the budget always stands."""
    groups = {}
    for group in group_runs(results.runs):
        label = group.arm
        if group.ratio is not None:
            label += " (small)" if group.ratio < SMALL else f" ({100 * group.ratio:g}%)"
        groups[label] = group
    return groups


def values(group: Group) -> dict[int, float]:
    """The main metric by seed."""
    return group.by_seed(group.runs[0].main_metric or "")


def pooled_differences() -> list[tuple[str, str, Difference]]:
    """Arm, baseline and their difference over the tasks that have both."""
    tasks = {task: labelled(runs_of(task)) for task in TASKS}
    found = []
    for arm, baseline in COMPARISONS:
        both = {task: g for task, g in tasks.items() if arm in g and baseline in g}
        difference = pooled_difference(
            {task: values(groups[arm]) for task, groups in both.items()},
            {task: values(groups[baseline]) for task, groups in both.items()},
        )
        if difference is not None:
            found.append((arm, baseline, difference))
    return found


def pooled_table() -> Table:
    """Differences over all tasks, and of each."""
    tasks = {task: labelled(runs_of(task)) for task in TASKS}
    rows = []
    for arm, baseline, difference in pooled_differences():
        cells = []
        for groups in tasks.values():
            pair = [groups.get(label) for label in (arm, baseline)]
            one = None
            if pair[0] is not None and pair[1] is not None:
                one = paired_difference(values(pair[0]), values(pair[1]))
            cells.append("" if one is None else f"{100 * one.mean:+.2f}")
        rows.append((arm, baseline, points(difference), *cells))
    return ("arm", "compared with", "difference, all tasks", *TASKS), rows


def points(difference: Difference) -> str:
    """A difference in points, hundredths of the metric."""
    if difference.interval is None:
        return f"{100 * difference.mean:+.2f}"
    low, high = (100 * bound for bound in difference.interval)
    return f"{100 * difference.mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def task_table(name: str) -> Table:
    """Every arm of a task: mean and deviation over the seeds, learning rate, cost."""
    rows = []
    for label, group in labelled(runs_of(name)).items():
        finished = group.finished
        if not finished:
            continue
        rows.append(
            (
                label,
                f"{finished[0].trainable_params:,}",
                f"{finished[0].learning_rate:g}",
                format_spread(spread(100 * v for v in values(group).values()), "{:.2f}"),
                format_spread(spread(r.metrics["eval_loss"] for r in finished), "{:.3f}"),
                str(len(finished)),
                f"{median(r.train_seconds for r in finished):.0f}",
                f"{median(r.score_seconds for r in finished):.1f}",
            )
        )
    metric = next((r.main_metric for r in runs_of(name).runs if r.main_metric), "metric")
    headers = ("arm", "parameters", "learning rate", metric, "loss", "seeds")
    return (*headers, "training (s)", "choosing (s)"), rows


def candidates_table() -> Table:
    """The rules on held-out examples of SST-2, each at its best learning rate."""
    best: dict[str, dict[str, str]] = {}
    means: dict[str, list[float]] = {}
    for budget, sweep, names in CANDIDATES:
        runs = runs_of(sweep, exactly=True).search
        for (arm, ratio), rate in chosen_learning_rates(runs, "accuracy", True).items():
            name = names.get(arm, arm) if ratio in (None, 0.25) or ratio < SMALL else ""
            if not name:
                continue
            (run,) = (r for r in runs if (r.arm, r.ratio, r.learning_rate) == (arm, ratio, rate))
            accuracy = 100 * run.metrics["accuracy"]
            best.setdefault(name, {})[budget] = (
                f"{accuracy:.2f} / {run.metrics['eval_loss']:.3f} ({rate:g})"
            )
            means.setdefault(name, []).append(accuracy)
    rows = [
        (
            name,
            *(found.get(budget, "") for budget in ("25%", "small")),
            f"{sum(means[name]) / 2:.2f}" if len(found) == 2 else "",
        )
        for name, found in best.items()
    ]
    return ("rule", "25%", "small", "mean"), rows


def differences_figure(differences: list[tuple[str, str, Difference]]) -> Figure:
    """Each comparison's mean and interval, in points."""
    with figure_style():
        figure = Figure(figsize=(7.2, 0.9 + 0.32 * len(differences)))
        axes = figure.subplots()
        for row, (_, _, difference) in enumerate(differences):
            low, high = difference.interval or (difference.mean, difference.mean)
            axes.plot([100 * low, 100 * high], [row, row], color="#3b7dd8", lw=2)
            axes.plot(100 * difference.mean, row, "o", color="#3b7dd8")
        axes.axvline(0, color=TEXT, lw=1)
        names = [f"{arm} - {baseline}" for arm, baseline, _ in differences]
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("points, mean over tasks and seeds, 95% interval")
    return figure


if __name__ == "__main__":
    main()
