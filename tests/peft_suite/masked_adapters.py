"""A pytest plugin: masks half of the entries of every adapter, and reports each test's outcome.

Named on pytest's command line (`-p masked_adapters`), it is imported before PEFT's tests are, so
that these import the `get_peft_model` that masks.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import time
import zlib
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import huggingface_hub.utils._http
import peft
import peft.mapping_func
import pytest
import torch
from torch import nn

from fish_tuning import apply_mask, create_mask_from_fisher

SEED = 0

# Tests turn the hub back on. Without it, they would wait between attempts.
huggingface_hub.utils._http.time = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("masked adapters")
    group.addoption("--masked", action="store_true", help="mask half of every adapter")
    group.addoption("--outcomes", help="file that gets a line of JSON for each test")
    group.addoption("--per-tuner", type=int, default=0, help="configs of a tuner kept per test")
    group.addoption(
        "--share", type=float, default=1.0, help="share of the tests of all tuners to run"
    )
    group.addoption("--only", help="file with the names of the tests to run")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--outcomes") and not hasattr(config, "workerinput"):
        _outcomes.append(config.getoption("--outcomes"))
    if config.getoption("--masked"):
        peft.get_peft_model = peft.mapping_func.get_peft_model = _masking(peft.get_peft_model)


_outcomes: list[str] = []
"""The file for the outcomes, in the main process."""
_refusals: list[str] = []
"""Why models of the current test have no mask."""


def _masking(get_peft_model: Any) -> Any:
    @functools.wraps(get_peft_model)
    def masked(*args: Any, **kwargs: Any) -> nn.Module:
        model = get_peft_model(*args, **kwargs)
        generator = torch.Generator().manual_seed(SEED)
        scores = {
            name: torch.rand(p.shape, generator=generator) + 1e-3
            for name, p in model.named_parameters()
            if p.requires_grad and not p.is_meta and p.numel()
        }
        for score in scores.values():
            # Without an entry of some small tensor, some adapters have no gradient anywhere.
            score.view(-1)[0] = 2
        if scores:
            try:
                apply_mask(model, create_mask_from_fisher(scores, 0.5))
            except ValueError as error:
                _refusals.append(str(error))
        return model

    return masked


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the first configs of each tuner for each test, and of these an even share.

    The share goes by the tests' names, so that each run and each machine picks the same ones.
    Tests that do not run for every tuner are all kept.
    """
    per_tuner, share = config.getoption("--per-tuner"), config.getoption("--share")
    only = config.getoption("--only")
    named = set(Path(only).read_text().splitlines()) if only else None
    seen: collections.Counter[tuple[str, ...]] = collections.Counter()
    kept = []
    for item in items:
        if named is not None:
            if item.nodeid in named:
                kept.append(item)
            continue
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if (tuner := parameters.get("config_cls")) is not None:
            model = str(parameters.get("model_id"))
            # Of PEFT's own small modules all, of models from the hub whichever comes first.
            key = item.nodeid.split("[")[0], tuner.__name__, "" if "/" in model else model[:20]
            seen[key] += 1
            if per_tuner and seen[key] > per_tuner:
                continue
            if zlib.crc32(item.nodeid.encode()) >= share * 2**32:
                continue
        kept.append(item)
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Notes what the report has to take from a worker to the main process."""
    report = yield
    error = call.excinfo.exconly()[:400] if call.excinfo else ""
    vars(report).update(error=error, refusals=_refusals[:])
    if report.when == "call":
        _refusals.clear()
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Writes outcomes in the main process, which also hears of workers that crash."""
    if _outcomes and (report.when == "call" or report.outcome != "passed"):
        row = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "error": getattr(report, "error", str(report.longrepr)[:400]),
            "refusals": getattr(report, "refusals", []),
        }
        with open(_outcomes[0], "a") as file:
            file.write(json.dumps(row) + "\n")
