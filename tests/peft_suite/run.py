"""Runs PEFT's own tests with half of every adapter masked: what passes without a mask must pass.

    python tests/peft_suite/run.py CHECKOUT

CHECKOUT is a checkout or an unpacked source distribution of PEFT at the installed version. Models
from the hub are replaced by tiny random ones; tests that need more from it fail with and without
a mask, and so do not count. Tests that fail under a mask are run again without one. Those that
pass then are failures of ours, unless `allowed.toml` gives a reason.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import torch  # noqa: F401  (transformers looks for it)

HERE = Path(__file__).parent
ALLOWED = HERE / "allowed.toml"

LEFT_OUT = {
    "bufferdict": "no model",
    "common_gpu": "needs an accelerator",
    "config": "no model",
    "gptqmodel": "needs an accelerator",
    "gpu_examples": "needs an accelerator",
    "hub_features": "needs the hub",
    "lora_megatron": "needs Megatron",
    "quantization": "needs an accelerator",
    "stablediffusion": "needs the hub",
    "vision_models": "needs the hub",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--share", default="1", help="share of the tests of all tuners to run")
    parser.add_argument("--per-tuner", default="2", help="configs of a tuner per test")
    parser.add_argument("--processes", default="2")
    parser.add_argument("--outcomes", type=Path, help="folder for the outcomes of each test")
    parser.add_argument("tests", nargs="*", help="files, as in tests/test_loraplus.py; default all")
    options = parser.parse_intermixed_args()
    _check_version(options.checkout)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        _prepare(options.checkout, work)
        outcomes = options.outcomes or work
        masked = _run(options, work, outcomes / "masked.jsonl", ["--masked"])
        failed = work / "failed.txt"
        failed.write_text("\n".join(row["test"] for row in masked if row["outcome"] == "failed"))
        again = ["--only", str(failed)]
        plain = _run(options, work, outcomes / "plain.jsonl", again) if failed.read_text() else []
    return _compare(masked, plain)


def _check_version(checkout: Path) -> None:
    installed = importlib.metadata.version("peft")
    source = checkout / "src" / "peft" / "__init__.py"
    if not source.is_file() or not (checkout / "tests").is_dir():
        sys.exit(
            f"error: {checkout} is no checkout of PEFT (it has no src/peft and tests): name one of "
            f"version {installed}, or an unpacked source distribution"
        )
    version = re.search(r'__version__ = "(.*)"', source.read_text())
    if version is None or version[1] != installed:
        found = version[1] if version else "of no known version"
        sys.exit(f"error: {checkout} is PEFT {found}, but {installed} is installed")


def _prepare(checkout: Path, work: Path) -> None:
    """Copies the tests, as a package whatever the checkout holds, and builds the models."""
    shutil.copytree(checkout / "tests", work / "tests")
    (work / "tests" / "__init__.py").touch()
    for name in LEFT_OUT:
        (work / "tests" / f"test_{name}.py").unlink(missing_ok=True)
    sys.path.insert(0, str(HERE))
    from hub import build_hub

    build_hub(work / "hub")


def _run(options: Any, work: Path, outcomes: Path, extra: list[str]) -> list[dict[str, Any]]:
    outcomes.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "--quiet", "--tb=no", "--no-header", "-rN"]
    # Neither PEFT's coverage nor warnings as errors.
    command += ["-o", "addopts=", "-o", "filterwarnings=ignore", "-p", "no:cacheprovider"]
    command += ["-p", "masked_adapters", "--outcomes", str(outcomes.resolve()), "--timeout=300"]
    command += ["-n", options.processes, "--share", options.share]
    command += ["--per-tuner", options.per_tuner, *extra, *(options.tests or ["tests"])]
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    environment = {"PYTHONPATH": path, "HF_HOME": str(work / "hub"), "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=work, env=os.environ | environment, check=False)
    if done.returncode not in (0, 1) or not outcomes.is_file():
        sys.exit(f"error: pytest ended with {done.returncode}, before all tests had run")
    return [json.loads(line) for line in outcomes.read_text().splitlines()]


def _compare(masked: list[dict[str, Any]], plain: list[dict[str, Any]]) -> int:
    """Prints what fails under a mask alone, and returns how many of these have no reason."""
    passing = {row["test"] for row in plain if row["outcome"] == "passed"}
    worse = [row for row in masked if row["outcome"] == "failed" and row["test"] in passing]
    reasons = tomllib.loads(ALLOWED.read_text()).get("allowed", [])
    counts: collections.Counter[str] = collections.Counter()
    unexplained = []
    for row in worse:
        reason = next((r for r in reasons if re.search(r["tests"], row["test"])), None)
        if reason is None:
            unexplained.append(row)
        else:
            counts[reason["reason"]] += 1
    passed = sum(row["outcome"] == "passed" for row in masked)
    print(f"\n{passed + len(worse)} tests pass without a mask, {len(worse)} fail under one alone")
    refused = sum(row["outcome"] == "passed" and bool(row["refusals"]) for row in masked)
    print(f"{refused:5d} passed with a model whose adapter cannot be masked")
    for text, count in counts.most_common():
        print(f"{count:5d} allowed: {text}")
    for row in unexplained:
        print(f"FAILED {row['test']}\n       {row['error'][:200]!r}")
    return min(len(unexplained), 100)


if __name__ == "__main__":
    sys.exit(main())
