"""Write config files for tests."""

import textwrap
from pathlib import Path

MINIMAL = """
model:
  name: "roberta-base"
dataset:
  load_args: ["glue", "mrpc"]
lora:
  baseline_rank: 8
  fish_rank: 16
fish_tuning:
  prune_to_ratio_of_baseline: 0.5
"""


def written(folder: Path, text: str = MINIMAL, name: str = "experiment.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path
