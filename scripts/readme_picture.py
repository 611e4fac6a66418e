"""Draw the picture of the README, docs/study/small_budget.svg, from the runs of the study."""

import matplotlib.style
from matplotlib.figure import Figure
from study_page import TASKS, labeled, runs_of
from study_runs import STUDY, values

from fish_tuning.experiments.report.statistics import Difference, pooled_difference

PICTURE = STUDY / "small_budget.svg"
BASELINE = "LoRA r=1, values"
ARMS = {
    "LoRA-FISH (small)": "FISH: highest\nFisher information",
    "LoRA-FISH-rand (small)": "random entries",
    "LoRA-FISH-rev (small)": "lowest\nFisher information",
}
COLORS = ("#1d63c4", "#6b7280", "#c2410c")
STYLE = {
    # A card of its own: readable on light and dark pages.
    "savefig.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "svg.fonttype": "none",
    "svg.hashsalt": "fish-tuning",
}


def main() -> None:
    """Draw the picture and write it."""
    with matplotlib.style.context(["default", STYLE]):
        drawn(differences()).savefig(PICTURE, metadata={"Date": None})
    # Matplotlib ends some lines with blanks.
    lines = PICTURE.read_text(encoding="utf-8").splitlines()
    PICTURE.write_text("".join(f"{line.rstrip()}\n" for line in lines), encoding="utf-8")


def differences() -> dict[str, Difference]:
    """Each arm against LoRA with as many parameters, averaged over the tasks."""
    groups = {task: labeled(runs_of(task)) for task in TASKS}
    baseline = {task: values(of_task[BASELINE]) for task, of_task in groups.items()}
    found = {}
    for arm in ARMS:
        difference = pooled_difference(
            {task: values(of_task[arm]) for task, of_task in groups.items()}, baseline
        )
        assert difference is not None
        found[arm] = difference
    return found


def drawn(found: dict[str, Difference]) -> Figure:
    """Draw the mean and interval of each difference, in points."""
    figure = Figure(figsize=(7.2, 2.6))
    axes = figure.subplots()
    for row, (difference, color) in enumerate(zip(found.values(), COLORS, strict=True)):
        assert difference.interval is not None
        low, high = (100 * bound for bound in difference.interval)
        axes.plot([low, high], [row, row], color=color, lw=4, solid_capstyle="round", alpha=0.45)
        axes.plot(100 * difference.mean, row, "o", color=color, ms=9)
        axes.annotate(
            f"{100 * difference.mean:+.1f}",
            (100 * difference.mean, row),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            color=color,
            weight="bold",
        )
    axes.axvline(0, color="#1f2328", lw=1)
    axes.set_yticks(range(len(found)), list(ARMS.values()))
    axes.set_ylim(len(found) - 0.5, -0.7)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("points ahead of LoRA with as many parameters (four tasks, 95% interval)")
    axes.set_title("About 5,000 trained parameters, each arm at its own learning rate", fontsize=11)
    return figure


if __name__ == "__main__":
    main()
