"""What is measured while a run trains: parameters trained and changed, time, memory."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fish_tuning.masked_tensors.tensors import tensor_named

Report = Callable[[int, int, float | None], None]
"""Called with the number of steps done, the total number of steps and the last training loss."""


class CountError(RuntimeError):
    """A run did not train exactly the parameters of its budget."""


class Measurements(TrainerCallback):
    """Measures training from inside a transformers Trainer.

    - The optimizer must hold exactly the budget's number of scalars.
    - The scalars that training changed are counted after its last step, before the best checkpoint
      is loaded.
    - Training time adds up over interruptions: each checkpoint comes with a log entry that holds
      the seconds so far.

    Args:
        start: Copies of the adapter's and head's tensors before training, by name.
        budget: The number of scalars that the arm must train.
        report: Called at every step.
    """

    def __init__(self, start: Mapping[str, Tensor], budget: int, report: Report) -> None:
        self.start = start
        self.budget = budget
        self.report = report
        self.trainable: int | None = None
        self.changed: dict[str, Tensor] = {}
        self.seconds = 0.0
        self.memory = PeakMemory()
        self._running_since: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count what the optimizer holds, and continue the measurements of an interrupted run.

        Raises:
            CountError: The count is not the budget.
        """
        groups = kwargs["optimizer"].param_groups
        self.trainable = sum(p.numel() for group in groups for p in group["params"])
        if self.trainable != self.budget:
            raise CountError(
                f"the optimizer holds {self.trainable:,} scalars where the budget is "
                f"{self.budget:,}: the comparison would not be fair"
            )
        earlier: dict[str, float] = next(
            (entry for entry in reversed(state.log_history) if "train_seconds" in entry), {}
        )
        self.seconds = earlier.get("train_seconds", 0.0)
        self.memory.peak = int(earlier.get("peak_memory_bytes", 0))
        if state.global_step >= state.max_steps:
            self._compare(kwargs["model"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock if it is stopped: at first, and after an evaluation or a checkpoint."""
        if self._running_since is None:
            self._running_since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report, and after the last step compare the weights with the start."""
        self._pause_before_others(state, control)
        if state.global_step >= state.max_steps:
            self._compare(kwargs["model"])
        losses = (entry["loss"] for entry in reversed(state.log_history) if "loss" in entry)
        self.report(state.global_step, state.max_steps, next(losses, None))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock if an evaluation or a checkpoint follows."""
        self._pause_before_others(state, control)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add time and memory to the log entry, which a checkpoint will hold."""
        self._lap()
        state.log_history[-1]["train_seconds"] = self.seconds
        state.log_history[-1]["peak_memory_bytes"] = self.memory.peak

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self._running_since = None

    def changed_counts(self) -> dict[str, int]:
        """Number of scalars that differ from the start, by tensor."""
        return {name: int(bits.sum()) for name, bits in self.changed.items()}

    def check_inside(self, mask: Mapping[str, Tensor] | None, trainable: Iterable[str]) -> None:
        """Check that training changed nothing outside the mask or the trainable tensors.

        Args:
            mask: The mask of a masked arm.
            trainable: Names of the tensors that an arm without a mask trains.

        Raises:
            CountError: Training changed something else, or ended early.
        """
        if not self.changed:
            raise CountError("training ended before its last step")
        dense = set(trainable)
        outside = {}
        for name, bits in self.changed.items():
            if mask is not None and name in mask:
                bits = bits & ~mask[name].cpu()
            elif mask is None and name in dense:
                continue
            if bits.any():
                outside[name] = int(bits.sum())
        if outside:
            raise CountError(
                f"{sum(outside.values()):,} scalars changed that should have stayed frozen, in "
                f"{', '.join(list(outside)[:3])}"
            )

    def _compare(self, model: nn.Module) -> None:
        now = tensors_of(model, self.start)
        self.changed = {
            # NaN differs from itself: an entry that was NaN before has not changed.
            name: (now[name].cpu() != before) & ~(now[name].cpu().isnan() & before.isnan())
            for name, before in self.start.items()
        }

    def _pause_before_others(self, state: Any, control: Any) -> None:
        if control.should_save:
            # Log with every checkpoint. Otherwise the training loss since the last log entry would
            # be lost in an interruption, and the resumed run's curve would differ.
            control.should_log = True
        if control.should_evaluate or control.should_save:
            self._lap()
            self._running_since = None

    def _lap(self) -> None:
        if self._running_since is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.seconds += now - self._running_since
            self._running_since = now


def tensors_of(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """A model's tensors by name, whole under a mask too."""
    return {name: tensor_named(model, name).detach() for name in names}


def snapshot(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copy a model's tensors to main memory."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors_of(model, names).items()}


class PeakMemory:
    """Measures the peak memory inside a `with` block: of the accelerator, if there is one.

    Without an accelerator it samples the process's resident memory 50 times per second. That
    includes the interpreter and all libraries. What earlier runs have freed is first returned to
    the system: the C library would keep some of it, and it would count for every later run.
    """

    def __init__(self) -> None:
        self.of = "cuda:0" if torch.cuda.is_available() else "process"
        self._peak = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def peak(self) -> int:
        """The peak so far, in bytes."""
        if self.of != "process":
            self._peak = max(self._peak, torch.cuda.max_memory_allocated())
        return self._peak

    @peak.setter
    def peak(self, value: int) -> None:
        self._peak = max(self._peak, value)

    def __enter__(self) -> Self:
        if self.of != "process":
            torch.cuda.reset_peak_memory_stats()
        else:
            _return_freed_memory()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        import psutil

        process = psutil.Process()
        while True:
            self._peak = max(self._peak, process.memory_info().rss)
            if self._done.wait(0.02):
                return


def _return_freed_memory() -> None:
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # Of glibc.
