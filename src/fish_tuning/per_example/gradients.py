"""Per-example gradients of a batch in one backward pass.

Hooks on the modules that own the parameters, or on the adapter layers around them, record inputs
and output gradients. From these, closed forms (`closed_forms`) or the module's own forward, run
again (`recomputed`), compute the gradient of each example.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fish_tuning.distributed import any_process
from fish_tuning.engines import autocast_dtype
from fish_tuning.per_example.accumulate import accumulate
from fish_tuning.per_example.checks import (
    TotalsCheck,
    check_batch_axis,
    check_shared_rows,
    input_of,
)
from fish_tuning.per_example.errors import OnePassError
from fish_tuning.per_example.kept import Kept
from fish_tuning.per_example.memory import is_out_of_memory
from fish_tuning.per_example.prompts import one_prompt, prompted_models
from fish_tuning.per_example.sources import Bundle, Call, Sources
from fish_tuning.per_example.sums import GradientSums, Progress


class _Recording:
    """What the hooks see while a batch is watched.

    Attributes:
        size: The number of examples.
        progress: What earlier attempts at this batch have added.
        loss: The number of the loss that comes next.
        roots: Where backward ends: the outputs of watched modules that pass no gradient on to their
            inputs.
        shared: Modules called with one row for the whole batch, and their expanded outputs.
        expected: By bundle, the number of calls in the forward pass.
        arrived: By bundle, the calls that backward has reached.
        collecting: Whether a backward pass is running whose gradients are wanted.
        last: Whether no other backward pass follows.
        error: What went wrong in a hook that had to let the backward pass go on.
        forward_over: Whether the forward pass is over. Modules that are called later are parts of
            layers with gradient checkpointing, which run again.
    """

    def __init__(self, size: int, progress: Progress) -> None:
        self.size, self.progress, self.loss = size, progress, 0
        self.roots: list[GradientEdge] = []
        self.shared: list[tuple[nn.Module, Tensor]] = []
        self.expected: Counter[Bundle] = Counter()
        self.arrived: dict[Bundle, list[Call]] = defaultdict(list)
        self.collecting, self.last, self.forward_over = False, False, False
        self.error: Exception | None = None


class PerExampleGradients:
    """Adds the per-example gradients of batches to sums.

    Call the model inside `watching`, and then `backward` for each of the batch's losses.

    Args:
        model: The model whose forward passes are watched.
        sums: Where to add the gradients. Their parameters belong to the model; several modules
            may use a parameter, and several times.

    Raises:
        OnePassError: A parameter belongs to a module that is never called.
    """

    def __init__(self, model: nn.Module, sums: GradientSums) -> None:
        self._sums, self._prompted = sums, prompted_models(model)
        self._sources = Sources(model, sums)
        self._recording = _Recording(0, Progress())
        self._check: TotalsCheck | None = None
        self._checked, self._shared_checked, self._roots_suffice = False, False, False

    def recompute(self, error: OnePassError) -> bool:
        """Switches the modules that failed a check to recomputation.

        This works only for the first batch, the only one that is compared with autograd.

        Returns:
            Whether anything changed, so that another attempt may succeed.
        """
        return not self._checked and self._sources.recompute(error.modules)

    @contextmanager
    def checking_batch_axis(self) -> Iterator[None]:
        """Inside the block the model is called with one example, and the inputs are checked.

        A module that then gets more than one row (say, the tokens of all examples in one axis)
        cannot give the gradient of one example.

        Raises:
            OnePassError: On leaving the block, if there is such a module.
        """
        errors: list[OnePassError] = []

        def check(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            try:
                x = input_of(self._sources, module, args, kwargs, output)
                check_batch_axis(self._sources, module, x, 1)
            except OnePassError as error:
                errors.append(error)

        with self._hooked(check):
            yield
        if errors:
            modules = [module for error in errors for module in error.modules]
            raise OnePassError(str(errors[0]), modules)

    @contextmanager
    def watching(self, size: int, progress: Progress | None = None) -> Iterator[None]:
        """Inside the block the model is called with a batch, and `backward` with its losses.

        Args:
            size: The number of examples.
            progress: What the sums hold already, which is skipped; updated.

        Raises:
            OnePassError: A module is called with another number of rows than `size` or 1.
        """
        recording = _Recording(size, Progress() if progress is None else progress)
        self._recording = recording
        try:
            with self._hooked(self._on_forward), one_prompt(self._prompted):
                yield
            if recording.error is not None:
                raise recording.error
        except Exception as error:
            known = isinstance(error, OnePassError) or is_out_of_memory(error)
            if known or not recording.shared:
                raise
            name = self._sources.parameter_of(recording.shared[0][0])
            raise OnePassError(
                f"{name} gives one row for all examples, and the model fails with a row for each "
                f"({str(error).partition(chr(10))[0]})"
            ) from error
        finally:
            self._recording = _Recording(0, Progress())

    def backward(self, losses: Tensor, *, retain_graph: bool = False) -> None:
        """Adds the gradients of one loss of the watched batch.

        The first call also compares their sum with autograd's gradient, which would differ if the
        model used a parameter without calling its module.

        Args:
            losses: One loss per example, shape (b,).
            retain_graph: Whether to keep the graph for another loss of the same forward pass.

        Raises:
            OnePassError: A check failed. After any error of the first call the sums are 0 again.
        """
        recording = self._recording
        recording.forward_over = True
        if recording.shared and not self._shared_checked:
            check_shared_rows(self._sources, recording.shared, losses)
            self._shared_checked = True
        total = losses.sum()
        if self._checked:
            # Backward to the outputs nearest to the input passes through all others, and computes
            # no gradient of a weight.
            self._backward(total, retain_graph, recording.roots if self._roots_suffice else None)
        else:
            self._checked_backward(total, retain_graph)
        recording.loss += 1

    def _checked_backward(self, total: Tensor, retain_graph: bool) -> None:
        self._roots_suffice = _leaves(total) <= {id(leaf) for leaf in self._sums.leaves}
        try:
            self._check = TotalsCheck(self._sums)
            gradients = self._backward(total, retain_graph)
            self._raise_together()
            self._check.compare(self._sources, gradients)
        except Exception:
            # The sums were 0 before. Another attempt starts over, so that it is checked in full.
            self._sums.reset()
            self._recording.progress.reset()
            raise
        finally:
            self._check = None
        self._checked = True

    def _raise_together(self) -> None:
        """Raises in all processes if a hook failed in one of them."""
        if not self._sums.divided:
            return
        error = self._recording.error
        device = next(iter(self._sums.totals.values())).device
        if any_process(error is not None, device):
            raise error or torch.OutOfMemoryError("memory ran out in another process")

    @torch.no_grad()
    def _backward(
        self, total: Tensor, retain_graph: bool, roots: Sequence[GradientEdge] | None = None
    ) -> dict[str, Tensor]:
        """Runs a backward pass; the hooks add the per-example gradients meanwhile.

        Args:
            total: The loss of the batch.
            retain_graph: Whether another backward pass follows.
            roots: Where the pass ends; by default at the parameters.

        Returns:
            Autograd's gradients of the parameters, if the pass ends there.
        """
        recording = self._recording
        recording.collecting, recording.last = True, not retain_graph
        gradients: dict[str, Tensor] = {}
        with torch.autocast(total.device.type, enabled=False):
            if roots is None:
                gradients = self._sums.gradients(total, retain_graph=retain_graph)
            else:
                torch.autograd.grad(total, roots, retain_graph=retain_graph, allow_unused=True)
            # Bundles that were also used in calls on which the loss does not depend.
            for bundle in [bundle for bundle, calls in recording.arrived.items() if calls]:
                if self._sums.divided:
                    raise OnePassError(
                        f"{bundle[0]} has a call on which the loss does not depend, and its "
                        "modules hold only a part of their parameters by now"
                    )
                self._accumulate(bundle)
        recording.collecting = False
        return gradients

    @contextmanager
    def _hooked(self, hook: Callable[..., Tensor | None]) -> Iterator[None]:
        handles = [m.register_forward_hook(hook, with_kwargs=True) for m in self._sources.bundles]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _on_forward(
        self, module: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> Tensor | None:
        if self._sources.recomputing:
            return None
        x = input_of(self._sources, module, args, kwargs, output)
        if not output.requires_grad:
            return None
        recording = self._recording
        is_root = not x.requires_grad or (
            module in self._sources.recomputed and not _leads_to(x, output)
        )
        shared = len(x) == len(output) == 1 < recording.size
        if shared:
            # One row for the whole batch, such as positions or a prompt. Once it is expanded to a
            # row per example, each example has its own gradient.
            x, output = (row.expand(recording.size, *row.shape[1:]) for row in (x, output))
        check_batch_axis(self._sources, module, x, recording.size)
        kept = Kept(x)
        if not recording.forward_over:
            if shared:
                recording.shared.append((module, output))
            if is_root:
                # Not the tensor: a model may overwrite it (CTRL scales its embeddings in place),
                # and backward would end there, before it reaches this module.
                recording.roots.append(get_gradient_edge(output))
            recording.expected.update(self._sources.bundles[module])
            autocast = autocast_dtype(x.device.type)
            output.register_hook(partial(self._on_gradient, module, kept, autocast))
        return output if shared else None

    def _on_gradient(
        self, module: nn.Module, kept: Kept, autocast: torch.dtype | None, g: Tensor
    ) -> None:
        recording = self._recording
        if not recording.collecting:
            return
        call = Call(module, kept.get(last=recording.last), g.detach(), autocast)
        for bundle in self._sources.bundles[module]:
            recording.arrived[bundle].append(call)
            if len(recording.arrived[bundle]) == recording.expected[bundle]:
                self._accumulate(bundle)

    def _accumulate(self, bundle: Bundle) -> None:
        recording = self._recording
        calls = recording.arrived.pop(bundle)
        if recording.error is not None:
            return
        try:
            if self._check is not None:
                self._check.note_calls(bundle, calls)
            done = recording.progress.of_loss(recording.loss)
            accumulate(self._sums, self._sources, bundle, calls, done, self._check)
        except Exception as error:
            if not self._sums.divided:
                raise
            # Others may have had no error. They would wait forever for this process's part of the
            # exchanges that the rest of the backward pass makes.
            recording.error = error.with_traceback(None)


def _leads_to(x: Tensor, output: Tensor) -> bool:
    """Whether backward from a module's output reaches its input.

    BART's positions take no more than the shape of their input.
    """
    end = get_gradient_edge(x).node
    seen, stack = set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is end:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(parent for parent, _ in node.next_functions)
    return False


def _leaves(output: Tensor) -> set[int]:
    """The ids of the leaf tensors at which backward from a scalar ends."""
    found, seen, stack = set(), set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            found.add(id(variable))
        stack.extend(parent for parent, _ in node.next_functions)
    return found
