"""Sweeps made by hand for the tests of reports."""

import math
import random

from fish_tuning.experiments.results import Results, Run, ScoreHistogram, TensorDensity

ARMS = ("Original LoRA", "LoRA-FISH", "LoRA-FISH-rand", "LoRA-FISH-rev")
BASE = {
    "Original LoRA": 0.783,
    "LoRA-FISH": 0.792,
    "LoRA-FISH-rand": 0.673,
    "LoRA-FISH-rev": 0.509,
}


def make_run(arm, seed, ratio=None, **changes):
    """A finished run of BERT-like shape: 6 layers, query, key and value."""
    rng = random.Random(f"{arm} {seed} {ratio}")
    final = BASE.get(arm, 0.7) + 0.03 * math.log10(ratio or 1) + rng.uniform(-0.012, 0.012)
    steps = range(10, 257, 10)
    masked = arm.startswith("LoRA-FISH")
    density, histograms = [], []
    if masked:
        for layer in range(6):
            for module in ("query", "key", "value"):
                for side, entries in (("A", 3072), ("B", 3072)):
                    share = (ratio or 1) * 0.25 * (1.6 if module == "value" else 0.7)
                    density.append(
                        TensorDensity(
                            name=f"base_model.model.bert.encoder.layer.{layer}.attention.self."
                            f"{module}.lora_{side}.default.weight",
                            selected=int(entries * share * (0.4 + 0.2 * layer)),
                            entries=entries,
                        )
                    )
        for kind, center, zeros in (("lora_A", -9, 1200), ("lora_B", -6, 0)):
            edges = [center - 4 + 0.25 * i for i in range(33)]
            counts = [
                int(9000 * math.exp(-((e - center - rng.uniform(0, 0.3)) ** 2) / 2))
                for e in edges[:-1]
            ]
            histograms.append(
                ScoreHistogram(kind=kind, zeros=zeros, log10_edges=edges, counts=counts)
            )
    count = 28_418 if ratio is None else round(28_418 * ratio)
    values = {
        "run_id": f"{arm.replace(' ', '_')}-ratio{ratio or 0}-{seed}",
        "arm": arm,
        "ratio": ratio,
        "seed": seed,
        "status": "finished",
        "config": {"model": {"name": "minilm"}},
        "budget": count,
        "trainable_params": count,
        "changed_params": count,
        "total_params": 22_800_000,
        "main_metric": "accuracy",
        "metrics": {"accuracy": round(final, 4), "eval_loss": 0.45},
        "curve": [
            {
                "step": s,
                "epoch": s / 128,
                "eval_loss": 0.7 - s / 1000,
                "accuracy": final - 0.25 * math.exp(-s / 60),
            }
            for s in range(32, 257, 32)
        ],
        "train_curve": [
            {"step": s, "loss": 0.4 + 0.5 * math.exp(-s / 70) + rng.uniform(-0.03, 0.03)}
            for s in steps
        ],
        "train_seconds": 60 + rng.uniform(0, 3),
        "score_seconds": 2.5 if masked else 0.0,
        "peak_memory_bytes": (700 + seed) * 2**20,
        "peak_memory_of": "process",
        "adapter_bytes": 445_000,
        "adapter": f"runs/{arm}-{seed}/adapter",
        "mask_density": density,
        "score_histograms": histograms,
        "versions": {"python": "3.11.2", "torch": "2.13.0"},
        "commit": "0123abc",
        "hardware": {"processor": "two cores", "memory_bytes": 8_000_000_000},
        "started_at": "2026-11-01T10:00:00Z",
        "finished_at": "2026-11-01T10:02:00Z",
    }
    return Run(**{**values, **changes})


def make_sweep(seeds=(1, 2, 3), ratios=(1.0,), arms=ARMS, name="quickstart", config=None):
    """A sweep: the baseline once per seed, the masked arms at every ratio."""
    runs = [
        make_run(arm, seed, ratio if arm != "Original LoRA" else None)
        for position, ratio in enumerate(ratios)
        for seed in seeds
        for arm in arms
        if arm != "Original LoRA" or position == 0
    ]
    config = config or {"model": {"name": "minilm"}, "dataset": {"name": "installed_text"}}
    return Results(name=name, config=config, runs=runs)


def failed_run(
    arm="LoRA-FISH", seed=9, error="ValueError: training diverged", ratio=None, **changes
):
    """A run of which only the error is known."""
    return Run(
        run_id=f"{arm}-{seed}",
        arm=arm,
        ratio=ratio,
        seed=seed,
        status="failed",
        error=error,
        config={},
        started_at="2026-11-01T10:00:00Z",
        finished_at="2026-11-01T10:00:01Z",
        **changes,
    )
