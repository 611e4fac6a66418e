"""Fill the tables and the figure of docs/study/README.md from the runs in docs/study/runs/.

`python scripts/study_page.py --take results/studies/sst2` first copies a sweep's `results.csv`
there. Without `--take` the tables are rebuilt from the runs that are there: the same runs give the
same page.
"""

from collections.abc import Mapping
from statistics import median

from matplotlib.figure import Figure
from study_runs import STUDY, difference_of, interval, read_runs, rebuild, values

from fish_tuning.experiments.report.arm_runs import ArmRuns, group_runs
from fish_tuning.experiments.report.figures.picture import picture_style
from fish_tuning.experiments.report.statistics import Difference, pooled_difference, spread
from fish_tuning.experiments.report.summary_table import format_spread
from fish_tuning.experiments.results import Results
from fish_tuning.experiments.runs.search import chosen_learning_rates
from fish_tuning.experiments.tables import Table

TASKS = ("sst2", "text", "mrpc", "cola")
"""Tasks over which the differences are averaged."""
RANKS = ("ranks_sst2", "ranks_text")
"""Ranks by Fisher information; the unit of their budgets is LoRA of rank 2."""
DECODER = ("decoder",)
"""The second architecture, on the task of `text`."""
SMALL = 0.1
"""Budgets below this fraction of LoRA's size are "small"; which fraction depends on the head."""
COMPARISONS = (
    ("LoRA-FISH (100%)", "Original LoRA"),
    ("LoRA-FISH (50%)", "Original LoRA"),
    ("LoRA-FISH (25%)", "Original LoRA"),
    ("LoRA-FISH (50%)", "LoRA r=4"),
    ("LoRA-FISH (25%)", "LoRA r=2"),
    ("LoRA-FISH (small)", "LoRA r=1, values"),
    ("LoRA-FISH (small)", "LoRA r=2, last layer"),
    ("LoRA-FISH (100%)", "LoRA-FISH-rand (100%)"),
    ("LoRA-FISH-rand (100%)", "LoRA-FISH-rev (100%)"),
    ("LoRA-FISH (small)", "LoRA-FISH-rand (small)"),
    ("LoRA-FISH-rand (small)", "LoRA-FISH-rev (small)"),
    ("LoRA-FISH (small)", "equal shares (small)"),
    ("LoRA-FISH (small)", "highest scores (small)"),
    ("LoRA-FISH (small)", "as published (small)"),
    ("LoRA-FISH-ranks (100%)", "Original LoRA"),
    ("LoRA-FISH-ranks (100%)", "LoRA-FISH (100%)"),
)
PEERS = {
    "Original LoRA": "LoRA-FISH (100%)",
    "LoRA (FISH rank)": "LoRA-FISH (100%)",
    "LoRA-FA": "LoRA-FISH (100%)",
    "DoRA r=8": "LoRA-FISH (100%)",
    "PiSSA r=8": "LoRA-FISH (100%)",
    "SHiRA r=8": "LoRA-FISH (100%)",
    "RandLoRA r=26": "LoRA-FISH (100%)",
    "AdaLoRA, 12 to 8": "LoRA-FISH (100%)",
    "LoRA r=4": "LoRA-FISH (50%)",
    "LoRA r=2": "LoRA-FISH (25%)",
    "VeRA r=256": "LoRA-FISH (11%)",
}
"""Alternatives to FISH, each with FISH at the same parameter count or the nearest below."""
CANDIDATES = {"25%": "candidates_quarter", "small": "candidates_small"}
"""Budget to sweep, for the table of rules."""
MORE = {"small": "candidates_more"}
"""Budget to sweep, for the table of what the default rule ranks by and selects from."""
BALANCED = {"LoRA-FISH": "balanced", "LoRA-FISH-rand": "random, balanced"}
"""What the table of rules calls these arms: `balanced` was the default rule of its sweeps."""


def main() -> None:
    """Take the sweeps named on the command line, and write the page and its figure."""
    rebuild(STUDY / "README.md", tables)
    figure = differences_figure(pooled_differences())
    with picture_style():
        figure.savefig(STUDY / "differences.svg", metadata={"Date": None})


def tables() -> dict[str, Table]:
    """Make all tables of the page, by the names in its markers."""
    return {
        "pooled": differences_table(TASKS),
        "carried_over": differences_table(DECODER),
        "ranks": differences_table(RANKS),
        "peers": peers_table(),
        "candidates": candidates_table(CANDIDATES, BALANCED),
        "more": candidates_table(MORE, {}),
        **{name: task_table(name) for name in (*TASKS, *DECODER, *RANKS)},
    }


def runs_of(name: str) -> Results:
    """Read the runs of a sweep and of those whose names continue its name."""
    files = sorted((STUDY / "runs").glob("*.csv"))
    return read_runs(*(f for f in files if f.stem == name or f.stem.startswith(f"{name}_")))


def labeled(results: Results) -> dict[str, ArmRuns]:
    """Group the runs by label, which always includes the budget."""
    groups = {}
    for group in group_runs(results.runs):
        label = group.arm
        if group.ratio is not None:
            label += " (small)" if group.ratio < SMALL else f" ({100 * group.ratio:.3g}%)"
        groups[label] = group
    return groups


def pooled_differences(
    tasks: tuple[str, ...] = TASKS, metric: str = ""
) -> list[tuple[str, str, Difference]]:
    """Return arm, baseline and their difference over the tasks that have both."""
    groups = {task: labeled(runs_of(task)) for task in tasks}
    found = []
    for arm, baseline in COMPARISONS:
        both = {task: g for task, g in groups.items() if arm in g and baseline in g}
        difference = pooled_difference(
            {task: values(g[arm], metric) for task, g in both.items()},
            {task: values(g[baseline], metric) for task, g in both.items()},
        )
        if difference is not None:
            found.append((arm, baseline, difference))
    return found


def differences_table(tasks: tuple[str, ...]) -> Table:
    """Differences over all tasks, and on each where there are several."""
    each = tasks if len(tasks) > 1 else ()
    groups = [labeled(runs_of(task)) for task in each]
    rows = []
    losses = pooled_differences(tasks, "eval_loss")
    for (arm, baseline, difference), (*_, loss) in zip(
        pooled_differences(tasks), losses, strict=True
    ):
        ones = [difference_of(g, arm, baseline) for g in groups]
        cells = ["" if one is None else f"{100 * one.mean:+.2f}" for one in ones]
        rows.append((arm, baseline, interval(difference), *cells, interval(loss, "{:+.3f}", 1)))
    return Table(("arm", "compared with", "points", *each, "loss"), tuple(rows))


def peers_table() -> Table:
    """Every other method on SST-2, and how far ahead of it FISH of the same size is."""
    groups = labeled(runs_of("sst2")) | labeled(runs_of("peers_sst2"))
    rows = []
    for peer, fish in PEERS.items():
        difference = difference_of(groups, fish, peer)
        if difference is not None:
            rows.append((*arm_cells(peer, groups[peer])[:-2], fish, interval(difference)))
    headers = ("method", *arm_headers("accuracy"), "compared with", "FISH ahead by")
    return Table(headers, tuple(rows))


def arm_cells(label: str, group: ArmRuns) -> tuple[str, ...]:
    """Return an arm's row: size, learning rate, mean and deviation over the seeds, cost."""
    runs = group.finished
    return (
        label,
        f"{runs[0].trainable_params:,}",
        f"{runs[0].learning_rate:g}",
        format_spread(spread(100 * v for v in values(group).values()), "{:.2f}"),
        format_spread(spread(r.metrics["eval_loss"] for r in runs), "{:.3f}"),
        str(len(runs)),
        f"{median(r.train_seconds for r in runs if r.train_seconds is not None):.0f}",
        f"{median(r.score_seconds for r in runs if r.score_seconds is not None):.1f}",
    )


def arm_headers(metric: str) -> tuple[str, ...]:
    """Return the headers of the cells of `arm_cells`, except the label and the cost."""
    return ("parameters", "learning rate", metric, "loss", "seeds")


def task_table(name: str) -> Table:
    """All arms of a task."""
    runs = runs_of(name)
    rows = [arm_cells(*pair) for pair in labeled(runs).items() if pair[1].finished]
    metric = (runs.runs[0].main_metric or "").replace("_", " ")
    headers = ("arm", *arm_headers(metric), "training (s)", "choosing (s)")
    return Table(headers, tuple(rows))


def candidates_table(sweeps: Mapping[str, str], names: Mapping[str, str]) -> Table:
    """The rules on held-out examples of SST-2, each at its best learning rate."""
    best: dict[str, dict[str, str]] = {}
    for budget, sweep in sweeps.items():
        runs = runs_of(sweep).search
        for (arm, ratio), rate in chosen_learning_rates(runs, "accuracy", True).items():
            (run,) = (r for r in runs if (r.arm, r.ratio, r.learning_rate) == (arm, ratio, rate))
            best.setdefault(names.get(arm, arm), {})[budget] = (
                f"{100 * run.metrics['accuracy']:.2f} / {run.metrics['eval_loss']:.3f} ({rate:g})"
            )
    rows = [(rule, *(own.get(budget, "") for budget in sweeps)) for rule, own in best.items()]
    return Table(("rule", *sweeps), tuple(rows))


def differences_figure(differences: list[tuple[str, str, Difference]]) -> Figure:
    """Draw the mean and interval of each comparison, in points."""
    with picture_style():
        figure = Figure(figsize=(7.2, 0.9 + 0.32 * len(differences)))
        axes = figure.subplots()
        for row, (_, _, difference) in enumerate(differences):
            low, high = difference.interval or (difference.mean, difference.mean)
            axes.plot([100 * low, 100 * high], [row, row], color="#3b7dd8", lw=2)
            axes.plot(100 * difference.mean, row, "o", color="#3b7dd8")
        axes.axvline(0, color="#59636f", lw=1)
        names = [f"{arm} - {baseline}" for arm, baseline, _ in differences]
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="x", color="#d1d9e1")
        axes.set_xlabel("points, mean over tasks and seeds, 95% interval")
    return figure


if __name__ == "__main__":
    main()
