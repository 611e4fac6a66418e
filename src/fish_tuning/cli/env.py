"""`fish-tuning env`."""

import os
import platform
import sys
from collections.abc import Iterator

from fish_tuning.cli.terminal import show


def env() -> None:
    """Show versions, platform and devices, for bug reports."""
    rows = [*_platform(), *_versions(), *_devices()]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        show(f"{name:<{width}}  {value}")


def _platform() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "platform", platform.platform()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "processors", f"{usable} usable, {platform.machine()}"
    yield "virtual environment", str(sys.prefix != sys.base_prefix).lower()


def _versions() -> Iterator[tuple[str, str]]:
    from fish_tuning.experiments.environment import PACKAGES, versions

    found = versions()
    for package in PACKAGES:
        yield package, found.get(package, "not installed")


def _devices() -> Iterator[tuple[str, str]]:
    try:
        import torch
    # A broken installation may be what the bug report is about, so any error is worth showing.
    except Exception as error:
        yield "devices", f"torch cannot be imported: {type(error).__name__}: {error}"
        return
    yield "torch built for CUDA", str(torch.version.cuda)
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    yield "mps", str(torch.backends.mps.is_available()).lower()
    yield "torch threads", str(torch.get_num_threads())
