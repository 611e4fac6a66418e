"""Fill the tables and the figure of docs/study/language_models/README.md from its runs/.

`python scripts/language_models_page.py --take results/studies/language_models/e2e` first copies a
sweep's `results.csv` there. Without `--take` the same runs give the same page.
"""

from collections.abc import Mapping, Sequence
from statistics import mean, median

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from study_runs import STUDY, difference_of, interval, read_runs, rebuild, values

from fish_tuning.experiments.report.arm_runs import ArmRuns, group_runs
from fish_tuning.experiments.report.figures.picture import picture_style
from fish_tuning.experiments.report.statistics import spread
from fish_tuning.experiments.report.summary_table import format_spread
from fish_tuning.experiments.results import Results, Run
from fish_tuning.experiments.tables import Table

FOLDER = STUDY / "language_models"
SWEEPS = {
    "2,304": "e2e_smallest",
    "10,000": "e2e_small",
    "57,600": "e2e",
    "57,600, 240 steps": "e2e_long",
}
"""Number of trainable values, and of steps if it is not 60, to the sweep with such arms."""
FISH, RANDOM = "FISH", "random"
NAMES = {"Original LoRA": "LoRA r=1, q and v", "LoRA-FISH": FISH, "LoRA-FISH-rand": RANDOM}
"""What the page calls arms whose names say little without their config."""
LORA = ("LoRA r=1, q and v", "LoRA r=1, last values")
"""LoRA of as many values as FISH."""
RULES = "e2e_rules"
OTHER_TEXT = "python_reference_perplexity"
METRICS = {"loss": "eval_loss", "BLEU": "bleu", "ROUGE-L": "rouge_l", "other text": OTHER_TEXT}
"""Column to metric. All are means over the seeds, with the deviation between them."""
COSTS = ("training (s)", "peak (MB)", "file (MB)")
STYLES = {"eval_loss": "{:.3f}", "bleu": "{:.1f}", "rouge_l": "{:.3f}", OTHER_TEXT: "{:.2f}"}
DRAWN = ("2,304", "57,600")
"""The sweeps of the figure."""


def main() -> None:
    """Take the sweeps named on the command line, and write the page and its figure."""
    rebuild(FOLDER / "README.md", tables)
    with picture_style():
        figure = rates_figure({budget: search_losses(SWEEPS[budget]) for budget in DRAWN})
        figure.savefig(FOLDER / "learning_rates.svg", metadata={"Date": None})


def tables() -> dict[str, Table]:
    """Make all tables of the page, by the names in its markers."""
    found = {"budgets": budgets_table(), "rules": rules_table()}
    for budget, name in SWEEPS.items():
        found[f"arms {budget}"] = arms_table(arms(name))
        found[f"differences {budget}"] = differences_table(arms(name))
        found[f"rates {budget}"] = rates_table(search_losses(name))
    return found


def sweep(name: str) -> Results:
    """Read a sweep's runs."""
    return read_runs(FOLDER / "runs" / f"{name}.csv")


def arms(name: str) -> dict[str, ArmRuns]:
    """Group the runs of a sweep by arm."""
    return {NAMES.get(group.arm, group.arm): group for group in group_runs(sweep(name).runs)}


def budgets_table() -> Table:
    """The loss of LoRA, random entries and FISH at every budget."""
    rows = []
    for budget, name in SWEEPS.items():
        groups = arms(name)
        (lora,) = (groups[arm] for arm in LORA if arm in groups)
        difference = difference_of(groups, RANDOM, FISH, "eval_loss")
        assert difference is not None
        losses = (_spread(group, "eval_loss") for group in (lora, groups[RANDOM], groups[FISH]))
        rows.append((budget, *losses, interval(difference, "{:+.3f}", 1)))
    return Table(("values", "LoRA r=1", RANDOM, FISH, f"{RANDOM} - {FISH}"), tuple(rows))


def arms_table(groups: Mapping[str, ArmRuns]) -> Table:
    """Every arm: its size, its rate, what it reaches and what it costs."""
    headers = ("arm", "values", "learning rate", *METRICS, "seeds", *COSTS)
    rows = [_before_row(next(iter(groups.values())).finished)] if groups else []
    for arm, group in groups.items():
        runs = group.finished
        rows.append(
            (
                arm,
                f"{runs[0].trainable_params:,}",
                f"{runs[0].learning_rate:g}",
                *(_spread(group, metric) for metric in METRICS.values()),
                str(len(runs)),
                f"{median(r.train_seconds for r in runs if r.train_seconds):.0f}",
                f"{median(r.peak_memory_bytes / 1e6 for r in runs if r.peak_memory_bytes):,.0f}",
                f"{median(r.adapter_bytes / 1e6 for r in runs if r.adapter_bytes):.2f}",
            )
        )
    return Table(headers, tuple(rows))


def _before_row(runs: Sequence[Run]) -> tuple[str, ...]:
    """What the model gives before training, which is the same for all arms."""
    known = runs[0].metrics_before  # Nothing is generated before training.
    metrics = (
        STYLES[metric].format(median(run.metrics_before[metric] for run in runs))
        if metric in known
        else ""
        for metric in METRICS.values()
    )
    return ("before training", "0", "", *metrics, *("" for _ in ("seeds", *COSTS)))


def _spread(group: ArmRuns, metric: str) -> str:
    return format_spread(spread(values(group, metric).values()), STYLES[metric])


def differences_table(groups: Mapping[str, ArmRuns], baseline: str = FISH) -> Table:
    """Every arm's distance from FISH, paired by seed."""
    rows = []
    for arm in groups:
        found = {m: difference_of(groups, arm, baseline, m) for m in METRICS.values()}
        if arm != baseline and found["eval_loss"] is not None:
            cells = (
                "" if one is None else interval(one, STYLES[m].replace("{:", "{:+"), 1)
                for m, one in found.items()
            )
            rows.append((arm, *cells))
    return Table((f"compared with {baseline}", *METRICS), tuple(rows))


def rules_table() -> Table:
    """Every rule at its best rate: the held-out loss that chose the rate, and the final runs."""
    searched, groups = search_losses(RULES), arms(RULES)
    best = {
        arm: min(run.metrics["eval_loss"] for run in runs.values())
        for arm, runs in searched.items()
    }
    rows = []
    for arm in sorted(best, key=lambda arm: best[arm]):
        runs = sorted(groups[arm].finished, key=lambda run: run.seed)
        losses = ", ".join(f"{run.metrics['eval_loss']:.3f}" for run in runs)
        other = mean(run.metrics[OTHER_TEXT] for run in runs)
        rows.append((arm, f"{runs[0].learning_rate:g}", f"{best[arm]:.3f}", losses, f"{other:.1f}"))
    return Table(("rule", "learning rate", "held-out loss", "loss", "other text"), tuple(rows))


def search_losses(name: str) -> dict[str, dict[float, Run]]:
    """Return the runs of a sweep's search by arm and learning rate."""
    found: dict[str, dict[float, Run]] = {}
    for run in sweep(name).search:
        assert run.learning_rate is not None
        found.setdefault(NAMES.get(run.arm, run.arm), {})[run.learning_rate] = run
    return found


def rates_table(found: Mapping[str, Mapping[float, Run]]) -> Table:
    """The held-out loss of every arm at every rate that was tried."""
    rates = sorted({rate for runs in found.values() for rate in runs})
    rows = [
        (arm, *(f"{runs[r].metrics['eval_loss']:.3f}" if r in runs else "" for r in rates))
        for arm, runs in found.items()
    ]
    return Table(("arm", *(f"{rate:g}" for rate in rates)), tuple(rows))


def rates_figure(searches: Mapping[str, Mapping[str, Mapping[float, Run]]]) -> Figure:
    """Draw the held-out loss over the learning rate: a panel for every budget."""
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    panels = figure.subplots(1, len(searches), squeeze=False)[0]
    lines: dict[str, Line2D] = {}
    for axes, (budget, found) in zip(panels, searches.items(), strict=True):
        for arm, runs in found.items():
            label = "LoRA r=1" if arm in LORA else arm
            color = lines[label].get_color() if label in lines else f"C{len(lines)}"
            rates = sorted(runs)
            losses = [runs[rate].metrics["eval_loss"] for rate in rates]
            (lines[label],) = axes.plot(rates, losses, "o-", color=color)
        best = min(run.metrics["eval_loss"] for runs in found.values() for run in runs.values())
        axes.set_ylim(best - 0.05, best + 0.55)  # Runs that diverge lie far above.
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("learning rate")
        axes.set_title(f"{budget} values")
    panels[0].set_ylabel("loss on held-out examples")
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize="small")
    return figure


if __name__ == "__main__":
    main()
