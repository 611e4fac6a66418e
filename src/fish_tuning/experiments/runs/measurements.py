"""What is measured while a run trains: scalars trained and changed, seconds, memory, loss."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

Report = Callable[[int, int, float | None], None]
"""Called with steps done, steps in all and the last training loss."""


class CountError(RuntimeError):
    """A run did not train what it was to train."""


class Measurements(TrainerCallback):
    """Measures a training from the inside of a transformers Trainer.

    - The scalars that the optimizer holds have to be the budget.
    - The scalars that differ from the start when training ends are counted before the best
      checkpoint takes their place.
    - Seconds go on between the checkpoints of an interrupted training: a log entry beside each
      checkpoint carries them.

    Args:
        start: The tensors that the arm may train, by name, as they are before training.
        budget: How many scalars the arm is to train.
        report: Told of every step.
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
        """Counts what the optimizer holds, and takes up what an interrupted training left.

        Raises:
            CountError: It is not the budget.
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
        """Lets the clock go on, at the start and after an evaluation or a checkpoint."""
        if self._running_since is None:
            self._running_since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reports, and takes the last step's weights."""
        self._pause_before_others(state, control)
        if state.global_step >= state.max_steps:
            self._compare(kwargs["model"])
        losses = (entry["loss"] for entry in reversed(state.log_history) if "loss" in entry)
        self.report(state.global_step, state.max_steps, next(losses, None))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As at the end of a step."""
        self._pause_before_others(state, control)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the seconds where the checkpoint that may follow keeps them."""
        self._lap()
        state.log_history[-1]["train_seconds"] = self.seconds
        state.log_history[-1]["peak_memory_bytes"] = self.memory.peak

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops the clock."""
        self._running_since = None

    def changed_counts(self) -> dict[str, int]:
        """Scalars that differ from the start, by tensor."""
        return {name: int(bits.sum()) for name, bits in self.changed.items()}

    def check_inside(self, mask: Mapping[str, Tensor] | None, trainable: Iterable[str]) -> None:
        """Check that nothing moved but what was to be trained.

        Args:
            mask: The mask of a masked arm.
            trainable: Names of the tensors that an arm without a mask trains.

        Raises:
            CountError: Something did, or training did not reach its end.
        """
        if not self.changed:
            raise CountError("training ended before its last step")
        whole = set(trainable)
        outside = {}
        for name, bits in self.changed.items():
            if mask is not None and name in mask:
                bits = bits & ~mask[name].cpu()
            elif mask is None and name in whole:
                continue
            if bits.any():
                outside[name] = int(bits.sum())
        if outside:
            raise CountError(
                f"{sum(outside.values()):,} scalars changed that were not to be trained, in "
                f"{', '.join(list(outside)[:3])}"
            )

    def _compare(self, model: nn.Module) -> None:
        now = tensors_of(model, self.start)
        self.changed = {
            # Bits, not values: an entry that became NaN has changed once, not with every look.
            name: (now[name].cpu() != before) & ~(now[name].cpu().isnan() & before.isnan())
            for name, before in self.start.items()
        }

    def _pause_before_others(self, state: Any, control: Any) -> None:
        if control.should_save:
            # A log entry beside every checkpoint: the training loss since the last one would
            # else be lost with the process, and the curve of a resumed run differ.
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
    """A model's tensors by name, whether they are parameters or a mask has made them buffers."""
    found: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: found[name].detach() for name in names}


def snapshot(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of a model's tensors in main memory."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors_of(model, names).items()}


class PeakMemory:
    """The highest memory while it is entered: of the accelerator if there is one.

    Without one it is the resident memory of the process, looked at fifty times a second. It holds
    the interpreter and all libraries, and what earlier runs of the process have not given back.
    """

    def __init__(self) -> None:
        self.of = "cuda:0" if torch.cuda.is_available() else "process"
        self._peak = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def peak(self) -> int:
        """The highest memory so far, in bytes."""
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
