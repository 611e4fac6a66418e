"""What a tracked run says in the end about the run's metrics, mask and scores."""

from __future__ import annotations

from fish_tuning.experiments.results import Run
from fish_tuning.names import place_of


def summary_of(run: Run) -> dict[str, float]:
    """Sum up a run's record in numbers by name: its metrics, its mask and its scores.

    Of the mask: how many entries it selects, and which fraction, by layer and by kind of tensor. Of
    the scores: by kind of tensor how many there are and which fraction of them is 0.
    """
    counts = {"budget": run.budget, "trainable": run.trainable_params, "total": run.total_params}
    numbers = {f"parameters/{name}": value for name, value in counts.items() if value is not None}
    summary: dict[str, float] = {**numbers}
    summary |= {f"final/{name}": value for name, value in run.metrics.items()}
    summary |= {f"before/{name}": value for name, value in run.metrics_before.items()}
    parts: dict[str, list[int]] = {}
    for tensor in run.mask_density:
        place = place_of(tensor.name)
        layer = "no layer" if place.layer is None else f"layer {place.layer}"
        for part in ("all", layer, f"{place.module} {place.side}".strip()):
            selected, entries = parts.get(part, (0, 0))
            parts[part] = [selected + tensor.selected, entries + tensor.entries]
    for part, (selected, entries) in parts.items():
        summary[f"mask/{part}/selected"] = selected
        summary[f"mask/{part}/density"] = selected / max(1, entries)
    for scores in run.score_histograms:
        entries = scores.zeros + sum(scores.counts)
        summary[f"scores/{scores.kind}/entries"] = entries
        summary[f"scores/{scores.kind}/zeros"] = scores.zeros / max(1, entries)
        if scores.counts:
            summary[f"scores/{scores.kind}/log10_highest"] = scores.log10_edges[-1]
    return summary
