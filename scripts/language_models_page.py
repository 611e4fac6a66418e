"""Fill the tables and the figure of docs/study/language_models/README.md from its runs/.

`python scripts/language_models_page.py --take results/studies/language_models/e2e` first copies a
sweep's `results.csv` there. Without `--take` the same runs give the same page.
"""

from collections.abc import Mapping, Sequence
from statistics import median

from matplotlib.figure import Figure
from study_runs import STUDY, difference_of, interval, read_runs, rebuild, values

from fish_tuning.experiments.report.arm_runs import ArmRuns, group_runs
from fish_tuning.experiments.report.figures.picture import picture_style
from fish_tuning.experiments.report.statistics import spread
from fish_tuning.experiments.report.summary_table import format_spread
from fish_tuning.experiments.results import Results, Run
from fish_tuning.experiments.tables import Table

FOLDER = STUDY / "language_models"
BUDGETS = {"57,600": "e2e"}
"""Number of trainable values to the sweep with arms of that size."""
NAMES = {"Original LoRA": "LoRA r=1, q and v", "LoRA-FISH": "FISH", "LoRA-FISH-rand": "random"}
"""What the page calls arms whose names say little without their config."""
OTHER_TEXT = "python_reference_perplexity"
METRICS = {"loss": "eval_loss", "BLEU": "bleu", "ROUGE-L": "rouge_l", "other text": OTHER_TEXT}
"""Column to metric. All are means over the seeds, with the deviation between them."""
COSTS = ("training (s)", "file (MB)")
STYLES = {"eval_loss": "{:.3f}", "bleu": "{:.1f}", "rouge_l": "{:.3f}", OTHER_TEXT: "{:.2f}"}


def main() -> None:
    """Take the sweeps named on the command line, and write the page and its figure."""
    rebuild(FOLDER / "README.md", tables)
    with picture_style():
        figure = rates_figure(search_losses("57,600"))
        figure.savefig(FOLDER / "learning_rates.svg", metadata={"Date": None})


def tables() -> dict[str, Table]:
    """Make all tables of the page, by the names in its markers."""
    return {
        **{f"arms {budget}": arms_table(arms(budget)) for budget in BUDGETS},
        **{f"differences {budget}": differences_table(arms(budget)) for budget in BUDGETS},
        **{f"rates {budget}": rates_table(search_losses(budget)) for budget in BUDGETS},
    }


def sweep(budget: str) -> Results:
    """Read the sweep of a budget."""
    return read_runs(FOLDER / "runs" / f"{BUDGETS[budget]}.csv")


def arms(budget: str) -> dict[str, ArmRuns]:
    """Group the runs of a budget by arm."""
    return {NAMES.get(group.arm, group.arm): group for group in group_runs(sweep(budget).runs)}


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


def differences_table(groups: Mapping[str, ArmRuns], baseline: str = "FISH") -> Table:
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


def search_losses(budget: str) -> dict[str, dict[float, Run]]:
    """Return the runs of a budget's searches by arm and learning rate."""
    found: dict[str, dict[float, Run]] = {}
    for run in sweep(budget).search:
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


def rates_figure(found: Mapping[str, Mapping[float, Run]]) -> Figure:
    """Draw the held-out loss over the learning rate, a line for every arm."""
    figure = Figure(figsize=(7.2, 3.6))
    axes = figure.subplots()
    for arm, runs in found.items():
        rates = sorted(runs)
        axes.plot(rates, [runs[r].metrics["eval_loss"] for r in rates], "o-", label=arm)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss on held-out examples")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


if __name__ == "__main__":
    main()
