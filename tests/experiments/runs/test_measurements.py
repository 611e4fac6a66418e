"""What is measured while a run trains."""

import os
import subprocess
import sys

import pytest
import torch

PROGRAM = """
import torch
from fish_tuning.experiments.runs.measurements import PeakMemory

pieces = [torch.ones(1_000_000) for _ in range(100)]
before = PeakMemory()
with before:
    pass
del pieces
with PeakMemory() as after:
    pass
print(before.peak - after.peak)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' allocators differ")
@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the process's memory")
def test_memory_of_earlier_runs_does_not_count():
    """Guards peaks of a sweep against what the C library keeps of runs before: here, all of it."""
    kept = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_MAX_": "0"}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **kept}, capture_output=True, check=True
    )
    assert int(found.stdout) > 350_000_000
