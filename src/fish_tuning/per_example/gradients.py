"""Per-example gradients of a whole batch in one backward pass.

Hooks on the modules that own the parameters, or on the adapter layers around them, collect inputs
and output gradients. Of these a closed form (`rules`) or the module's own forward, run again
(`recomputed`), makes the gradients of each example.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fish_tuning.per_example.closed_forms import embedding_rows
from fish_tuning.per_example.memory import is_out_of_memory
from fish_tuning.per_example.prompts import one_prompt
from fish_tuning.per_example.reduction import Entrywise, Reduction, precision
from fish_tuning.per_example.sources import Group, NoRuleError, Sources

CHUNK_ENTRIES = 2**24
"""Entries of per-example gradients alive at once: wide layers go a few examples at a time."""


Added = Counter[tuple[str, int]]
"""By parameter and number of the loss: how many of a batch's examples, the first ones, the sums
have already. An attempt that ran out of memory leaves it to the next one."""


class _Use:
    """One call of a module: its input, and its output's gradient once backward brings it."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.module, self.x = module, x
        kind = x.device.type
        self.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.g: Tensor | None = None


class PerExampleGradients:
    """Accumulates a reduction of the given parameters' per-example gradients.

    Call the model inside `watching` and then `backward`, batch after batch; `sums` holds the
    result, float64 for float64 parameters and float32 for all others.

    Args:
        model: The model whose forward passes are watched.
        parameters: The parameters, by name; each may be used by several modules, several times.
        reduction: What is kept of a gradient.

    Raises:
        NoRuleError: A parameter has no rule.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], reduction: Reduction
    ) -> None:
        self._model, self._parameters, self._reduction = model, parameters, reduction
        self.sums = {name: reduction.zeros(p) for name, p in parameters.items()}
        self._sources = Sources(model, parameters)
        self._size, self._loss = 0, 0
        self._added: Added = Counter()
        self._roots: list[Tensor] = []
        self._shared: list[tuple[nn.Module, Tensor]] = []
        self._expected: dict[Group, int] = defaultdict(int)
        self._arrived: dict[Group, list[_Use]] = defaultdict(list)
        self._totals: dict[str, Tensor] | None = None
        self._magnitudes: dict[str, Tensor] = {}
        self._checked, self._shared_checked = False, False
        self._roots_suffice, self._looking = False, False

    def recompute(self, error: NoRuleError) -> bool:
        """Whether there is another way to the gradients that did not hold; it is taken then.

        Not once a batch has been compared: nothing would tell whether the other way holds.
        """
        return not self._checked and self._sources.recompute(error.modules)

    @contextmanager
    def checking_batch_axis(self) -> Iterator[None]:
        """Inside the block the model is called with one example.

        A module that sees other than one row then (the tokens of all examples in one axis) has no
        gradient of one example to give.

        Raises:
            NoRuleError: On leaving the block, if there is such a module.
        """
        misfits: list[NoRuleError] = []

        def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            try:
                self._check_batch_axis(module, self._input(module, args, kwargs, output), 1)
            except NoRuleError as misfit:
                misfits.append(misfit)

        with self._hooked(look):
            yield
        if misfits:
            modules = [module for misfit in misfits for module in misfit.modules]
            raise NoRuleError(str(misfits[0]), modules)

    def _input(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor:
        """What a module was called with: of one that is run again, it has to be one tensor."""
        values = [*args, *kwargs.values()]
        x = values[0] if values else None
        if module in self._sources.recomputed:
            alone = len(args) == 1 and all(value is None for value in values[1:])
            if not (alone and isinstance(x, Tensor) and isinstance(output, Tensor)):
                raise NoRuleError(
                    f"{self._sources.groups[module][0][0]} is part of a {type(module).__name__}, "
                    "which takes or gives other than one tensor"
                )
        assert isinstance(x, Tensor)
        return x

    def _check_batch_axis(self, module: nn.Module, x: Tensor, size: int) -> None:
        if x.shape[:1] != (size,):
            raise NoRuleError(
                f"the module of {self._sources.groups[module][0][0]} is given {tuple(x.shape)} for "
                f"{size} example{'s' * (size != 1)}: its first axis is not the batch",
                [module],
            )

    @contextmanager
    def watching(self, size: int, added: Added | None = None) -> Iterator[None]:
        """Inside the block the model is called with a batch and `backward` for each of its losses.

        Args:
            size: The number of examples. A module that is called with another number of rows
                raises `NoRuleError` then and there; with one, its row is everybody's.
            added: What is left out, as the sums have it; what is added is entered.
        """
        self._size, self._loss = size, 0
        self._added = Counter() if added is None else added
        try:
            with self._hooked(self._on_forward), one_prompt(self._model):
                yield
        except (NoRuleError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if not self._shared or is_out_of_memory(error):
                raise
            name = self._sources.groups[self._shared[0][0]][0][0]
            raise NoRuleError(
                f"the rows of {name} are the same for all examples, and the model does not take "
                f"them for each ({str(error).partition(chr(10))[0]})"
            ) from error
        finally:
            self._roots, self._shared = [], []
            self._expected.clear()
            self._arrived.clear()

    @contextmanager
    def _hooked(self, hook: Callable[..., Tensor | None]) -> Iterator[None]:
        handles = [m.register_forward_hook(hook, with_kwargs=True) for m in self._sources.groups]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _on_forward(
        self, module: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> Tensor | None:
        if self._sources.running:
            return None
        x = self._input(module, args, kwargs, output)
        if not output.requires_grad:
            return None
        shared = len(x) == len(output) == 1 < self._size
        if shared:
            # As positions are, or a prompt: a row for each example lets each have its gradient.
            x, output = (row.expand(self._size, *row.shape[1:]) for row in (x, output))
            self._shared.append((module, output))
        self._check_batch_axis(module, x, self._size)
        if not x.requires_grad:
            self._roots.append(output)
        for group in self._sources.groups[module]:
            self._expected[group] += 1
        output.register_hook(partial(self._on_gradient, _Use(module, x.detach())))
        return output if shared else None

    def _on_gradient(self, use: _Use, g: Tensor) -> None:
        if self._looking:
            return
        use.g = g.detach()
        for group in self._sources.groups[use.module]:
            self._arrived[group].append(use)
            if len(self._arrived[group]) == self._expected[group]:
                self._accumulate(group)

    def backward(self, losses: Tensor, *, retain_graph: bool = False) -> None:
        """Adds the per-example gradients of a batch.

        The first call also asks autograd for the parameters' gradients and compares: a parameter
        that the forward uses behind its module's back would otherwise be missed.

        Args:
            losses: One loss an example, shape (b,).
            retain_graph: Keep the graph for another call on the same forward pass.

        Raises:
            NoRuleError: The sum over the examples is not the gradient of the batch; `sums` is 0
                again then, as after any other error of the first call.
        """
        if self._shared and not self._shared_checked:
            self._check_shared(losses)
        total = losses.sum()
        if self._checked:
            # With the outputs nearest to the input as targets, autograd passes through all
            # others and computes no weight gradient.
            targets = self._roots if self._roots_suffice else [*self._parameters.values()]
            self._backward(total, targets, retain_graph)
            self._loss += 1
            return
        self._roots_suffice = _leaves(total) <= {id(p) for p in self._parameters.values()}
        try:
            self._totals = {
                name: torch.zeros_like(p, dtype=precision(p), requires_grad=False)
                for name, p in self._parameters.items()
            }
            gradients = self._backward(total, [*self._parameters.values()], retain_graph)
            self._compare(self._totals, gradients)
        except Exception:
            # Nothing was in the sums before. Cleared, so that another attempt compares all of it.
            for wrong in self.sums.values():
                wrong.zero_()
            self._added.clear()
            raise
        finally:
            self._totals = None
        self._checked = True
        self._loss += 1

    def _check_shared(self, losses: Tensor) -> None:
        """Looks at rows that were one for all: the loss of an example depends on its own alone.

        A model that takes the first of them for everybody is caught here: the sum over the
        examples would be right.
        """
        for example in (0, self._size - 1):
            self._looking = True
            try:
                gradients = torch.autograd.grad(
                    losses[example],
                    [rows for _, rows in self._shared],
                    retain_graph=True,
                    allow_unused=True,
                )
            finally:
                self._looking = False
            for (module, _), gradient in zip(self._shared, gradients, strict=True):
                others = [row for row in range(self._size) if row != example]
                if gradient is not None and gradient[others].any():
                    raise NoRuleError(
                        f"the module of {self._sources.groups[module][0][0]} is given one row for "
                        f"{self._size} examples, and the model mixes them"
                    )
        self._shared_checked = True

    @torch.no_grad()
    def _backward(
        self, total: Tensor, targets: list[Any], retain_graph: bool
    ) -> tuple[Tensor | None, ...]:
        """Autograd's gradients, while the hooks collect the factors of those of each example."""
        with torch.autocast(total.device.type, enabled=False):
            gradients = torch.autograd.grad(
                total, targets, retain_graph=retain_graph, allow_unused=True
            )
            self._flush()
        return gradients

    def _flush(self) -> None:
        """Takes the parameters some of whose uses the loss does not depend on."""
        for group in [group for group, uses in self._arrived.items() if uses]:
            self._accumulate(group)

    @torch.no_grad()
    def _compare(self, totals: Mapping[str, Tensor], gradients: tuple[Tensor | None, ...]) -> None:
        excess = {}
        for (name, parameter), gradient in zip(self._parameters.items(), gradients, strict=True):
            gradient = torch.zeros_like(parameter) if gradient is None else gradient
            # Half precision may also come from autocast, over float32 parameters.
            kind = parameter.device.type
            autocast = torch.is_autocast_enabled(kind)
            dtype = torch.get_autocast_dtype(kind) if autocast else parameter.dtype
            eps = torch.finfo(dtype).eps
            # Gradients may cancel between the examples (hence their own scale) and between tokens,
            # down to rounding errors of the factors (a key's bias in attention).
            scale = gradient.norm() + self._reduction.norm(self.sums[name])
            allowed = max(1e-3, 8 * eps) * scale + 16 * eps * self._magnitudes.get(name, 0)
            excess[name] = (totals[name] - gradient).norm() - allowed
        # Looked at together: on an accelerator each look would wait for the device.
        device = next(iter(self.sums.values())).device
        together = torch.stack([beyond.to(device, torch.float32) for beyond in excess.values()])
        wrong = [
            name for name, beyond in zip(excess, together.tolist(), strict=True) if not beyond <= 0
        ]
        if wrong:
            raise NoRuleError(
                f"the gradient of {wrong[0]} is not the one its module's inputs give",
                self._sources.givers(wrong),
            )

    def _accumulate(self, group: Group) -> None:
        uses = self._arrived.pop(group)
        if self._totals is not None:
            like = self.sums[group[0]]
            magnitude = sum((_magnitude(use, like) for use in uses), start=like.new_zeros(()))
            self._magnitudes |= dict.fromkeys(group, magnitude)
        batch = len(uses[0].x)
        # An attempt that failed may have come further with some of them.
        first = min(self._added[name, self._loss] for name in group)
        if group in self._sources.looked_up and isinstance(self._reduction, Entrywise):
            if first < batch:
                self._accumulate_rows(group[0], self._reduction, uses, first)
                self._added[group[0], self._loss] = batch
            return
        step = max(1, CHUNK_ENTRIES // self._sources.entries[group])
        for start in range(first, batch, step):
            for name, gradient in self._gradients(group, uses, slice(start, start + step)).items():
                fresh = gradient[max(0, self._added[name, self._loss] - start) :]
                if self._totals is not None:
                    self._totals[name] += fresh.sum(0)
                self._reduction.add(self.sums[name], fresh)
                self._added[name, self._loss] = max(
                    self._added[name, self._loss], min(start + step, batch)
                )

    def _gradients(self, group: Group, uses: list[_Use], rows: slice) -> dict[str, Tensor]:
        """Of some of the examples, (rows, *shape) by name: all uses together."""
        gradients: dict[str, Tensor] = {}
        dtype = self.sums[group[0]].dtype
        for use in uses:
            assert use.g is not None
            found = self._sources.gradients(
                group, use.module, use.x[rows], use.g[rows], dtype, use.autocast
            )
            for name, of_use in found:
                known = gradients.get(name)
                gradients[name] = of_use if known is None else known + of_use
        return gradients

    def _accumulate_rows(
        self, name: str, reduction: Entrywise, uses: list[_Use], first: int
    ) -> None:
        """Embeddings: only the rows that an example looks up have a gradient."""
        sums = self.sums[name]
        pairs = [_rows_of(use, first, sums.dtype) for use in uses]
        ids = torch.cat([ids for ids, _ in pairs], 1)
        g = torch.cat([g for _, g in pairs], 1).flatten(0, 1)
        vocabulary = len(sums)
        keys = ids + vocabulary * torch.arange(len(ids), device=ids.device).unsqueeze(1)
        looked_up, position = keys.flatten().unique(return_inverse=True)
        rows = g.new_zeros(len(looked_up), g.shape[-1]).index_add_(0, position, g)
        if self._totals is not None:
            self._totals[name].index_add_(0, ids.flatten(), g)
        sums.index_add_(0, looked_up % vocabulary, reduction.raised(rows))


def _rows_of(use: _Use, first: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    assert use.g is not None
    return embedding_rows(use.module, use.x[first:], use.g[first:].to(dtype))


def _magnitude(use: _Use, like: Tensor) -> Tensor:
    """How large rounding errors can be, in units of the precision: of both factors' norms."""
    assert use.g is not None
    # The indices of an embedding are no factor.
    x = use.x.to(like.dtype).norm() if use.x.is_floating_point() else 0.0
    magnitude: Tensor = use.g.to(like.dtype).norm() * (x + use.g.numel() ** 0.5)
    return magnitude


def _leaves(output: Tensor) -> set[int]:
    """The ids of the tensors that backward from a scalar ends at."""
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
