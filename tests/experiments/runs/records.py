"""What sweeps in tests leave behind, without what differs from run to run."""

import json
from pathlib import Path

from safetensors.torch import load_file

from fish_tuning.experiments.results import RESULTS_FILE

TIMES = {"train_seconds", "score_seconds", "peak_memory_bytes", "started_at", "finished_at"}
FEW_ARMS = {"fish_tuning": {"methods_to_run": ["Original LoRA", "LoRA-FISH"]}}


def comparable(folder):
    """results.json without times and memory."""
    content = json.loads((Path(folder) / RESULTS_FILE).read_bytes())
    for run in [*content["runs"], *content["search"]]:
        for name in TIMES:
            del run[name]
    return content


def weights(folder, run):
    return load_file(Path(folder) / run.adapter / "adapter_model.safetensors")
