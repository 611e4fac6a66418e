"""Per-example gradients of a whole batch in one backward pass.

For a linear layer with input ``x`` and output gradient ``g`` the gradient of example ``b`` is
``sum_t g[b, t] x[b, t]^T``. Backward visits both factors anyway, so hooks on the modules that own
the parameters are all it takes. Each rule below is such a product, by type of module.
"""

import inspect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from fish_tuning.reduction import Entrywise, Reduction, precision

CHUNK_ENTRIES = 2**24
"""Entries of per-example gradients alive at once: wide layers go a few examples at a time."""


Added = Counter[tuple[str, int]]
"""By parameter and number of the loss: how many of a batch's examples, the first ones, the sums
have already. An attempt that ran out of memory leaves it to the next one."""


class NoRuleError(Exception):
    """Gradients of one pass do not hold for this model; the message says where and why."""


def _tokens(tensor: Tensor) -> Tensor:
    """Folds all positions of an example into one axis: (b, ..., d) -> (b, t, d)."""
    return tensor if tensor.dim() == 3 else tensor.reshape(len(tensor), -1, tensor.shape[-1])


def _linear_weight(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """y = x W^T: (b, t, i), (b, t, o) -> (b, o, i)."""
    return torch.bmm(_tokens(g).transpose(1, 2), _tokens(x))


def _conv1d_weight(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """y = x W, GPT-2's transposed linear layer: (b, t, i), (b, t, o) -> (b, i, o)."""
    return _linear_weight(module, g, x)


def _bias(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """y = ... + b: (b, t, o) -> (b, o)."""
    return _tokens(g).sum(1)


def _embedding_weight(module: Any, x: Tensor, g: Tensor) -> Tensor:
    """y = W[x]: (b, t), (b, t, d) -> (b, vocabulary, d)."""
    ids, g = _embedding_rows(module, x, g)
    rows = g.new_zeros(len(g), module.weight.shape[0], g.shape[-1])
    return rows.scatter_add_(1, ids.unsqueeze(-1).expand_as(g), g)


def _embedding_rows(module: Any, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    ids, g = x.reshape(len(x), -1), _tokens(g)
    if module.padding_idx is not None:
        g = g * (ids != module.padding_idx).unsqueeze(-1)
    return ids, g


def _layer_norm_weight(module: Any, x: Tensor, g: Tensor) -> Tensor:
    """y = w * normalized(x) + b over the last axis: (b, t, d), (b, t, d) -> (b, d)."""
    return _tokens(F.layer_norm(x, x.shape[-1:], eps=module.eps) * g).sum(1)


def _rms_norm_weight(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """y = w * n(x) or (1 + w) * n(x), n the norm: (b, t, d), (b, t, d) -> (b, d).

    The module itself computes n(x): some round to float32 in between, whatever the input is.
    """
    like = module.get_parameter("weight").to(x.dtype)
    at_one, at_zero = (
        functional_call(module, {"weight": torch.full_like(like, value)}, x) for value in (1, 0)
    )
    return _tokens((at_one - at_zero) * g).sum(1)


Rule = Callable[[nn.Module, Tensor, Tensor], Tensor]

# By forward function and not by class: a subclass that computes something else has another
# forward, and so no rule.
_RULES: dict[tuple[Callable[..., Any], str], Rule] = {
    (nn.Linear.forward, "weight"): _linear_weight,
    (nn.Linear.forward, "bias"): _bias,
    (Conv1D.forward, "weight"): _conv1d_weight,
    (Conv1D.forward, "bias"): _bias,
    (nn.Embedding.forward, "weight"): _embedding_weight,
    (nn.LayerNorm.forward, "weight"): _layer_norm_weight,
    (nn.LayerNorm.forward, "bias"): _bias,
}


def _rule_for(module: nn.Module, attribute: str) -> Rule | None:
    # transformers writes one RMSNorm class a model; one that borrows the name for something else
    # is caught when the first batch is compared with autograd.
    if type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")) and attribute == "weight":
        takes_one_input = len(inspect.signature(module.forward).parameters) == 1
        return _rms_norm_weight if takes_one_input else None
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        return None
    return _RULES.get((type(module).forward, attribute))


class _Use:
    """One call of a module: its input, and its output's gradient once backward brings it."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.module, self.x = module, x
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
        self._parameters, self._reduction = parameters, reduction
        self.sums = {name: reduction.zeros(p) for name, p in parameters.items()}
        names = {id(parameter): name for name, parameter in parameters.items()}
        self._owned: dict[nn.Module, list[tuple[str, Rule]]] = defaultdict(list)
        for module in model.modules():
            for attribute, parameter in module._parameters.items():
                if (name := names.get(id(parameter))) is not None:
                    if (rule := _rule_for(module, attribute)) is None:
                        kind = type(module).__name__
                        raise NoRuleError(f"{name}, {attribute!r} of a {kind}, has no rule")
                    self._owned[module].append((name, rule))
        self._size, self._loss = 0, 0
        self._added: Added = Counter()
        self._roots: list[Tensor] = []
        self._expected: dict[str, int] = defaultdict(int)
        self._arrived: dict[str, list[tuple[_Use, Rule]]] = defaultdict(list)
        self._totals: dict[str, Tensor] | None = None
        self._magnitudes: dict[str, Tensor] = {}
        self._checked = False
        self._roots_suffice = False

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
                self._check_batch_axis(module, _input(args, kwargs), 1)
            except NoRuleError as misfit:
                misfits.append(misfit)

        with self._hooked(look):
            yield
        if misfits:
            raise misfits[0]

    def _check_batch_axis(self, module: nn.Module, x: Tensor, size: int) -> None:
        if x.shape[:1] != (size,):
            raise NoRuleError(
                f"the module of {self._owned[module][0][0]} is given {tuple(x.shape)} for {size} "
                f"example{'s' * (size != 1)}: its first axis is not the batch"
            )

    @contextmanager
    def watching(self, size: int, added: Added | None = None) -> Iterator[None]:
        """Inside the block the model is called with a batch and `backward` for each of its losses.

        Args:
            size: The number of examples. A module that is called with another number of rows
                (positions shared by the batch) raises `NoRuleError` then and there.
            added: What is left out, as the sums have it; what is added is entered.
        """
        self._size, self._loss = size, 0
        self._added = Counter() if added is None else added
        try:
            with self._hooked(self._on_forward):
                yield
        finally:
            self._roots = []
            self._expected.clear()
            self._arrived.clear()

    @contextmanager
    def _hooked(self, hook: Callable[..., None]) -> Iterator[None]:
        handles = [m.register_forward_hook(hook, with_kwargs=True) for m in self._owned]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _on_forward(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        if not output.requires_grad:
            return
        x = _input(args, kwargs)
        self._check_batch_axis(module, x, self._size)
        if not x.requires_grad:
            self._roots.append(output)
        for name, _ in self._owned[module]:
            self._expected[name] += 1
        output.register_hook(partial(self._on_gradient, _Use(module, x.detach())))

    def _on_gradient(self, use: _Use, g: Tensor) -> None:
        use.g = g.detach()
        for name, rule in self._owned[use.module]:
            self._arrived[name].append((use, rule))
            if len(self._arrived[name]) == self._expected[name]:
                self._accumulate(name)

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
        for name in [name for name, uses in self._arrived.items() if uses]:
            self._accumulate(name)

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
        for name, beyond in zip(excess, together.tolist(), strict=True):
            if beyond > 0:
                raise NoRuleError(f"the gradient of {name} is not the one its module's inputs give")

    def _accumulate(self, name: str) -> None:
        uses = self._arrived.pop(name)
        sums = self.sums[name]
        totals = None if self._totals is None else self._totals[name]
        factors = [(use.module, rule, *_cast(use, sums)) for use, rule in uses]
        if totals is not None:
            self._magnitudes[name] = sum(
                (g.norm() * (_norm(x) + g.numel() ** 0.5) for _, _, x, g in factors),
                start=sums.new_zeros(()),
            )
        key, batch = (name, self._loss), len(factors[0][2])
        first = self._added[key]
        looked_up = all(rule is _embedding_weight for _, rule, _, _ in factors)
        if looked_up and isinstance(self._reduction, Entrywise):
            if first < batch:
                rows = [(module, rule, x[first:], g[first:]) for module, rule, x, g in factors]
                self._accumulate_rows(rows, self._reduction, sums, totals)
                self._added[key] = batch
            return
        step = max(1, CHUNK_ENTRIES // self._parameters[name].numel())
        whole = first == 0 and step >= batch
        for start in range(first, batch, step):
            part = slice(start, start + step)
            gradients = None
            for module, rule, x, g in factors:
                of_use = rule(module, x, g) if whole else rule(module, x[part], g[part])
                gradients = of_use if gradients is None else gradients + of_use
            assert gradients is not None
            if totals is not None:
                totals += gradients.sum(0)
            self._reduction.add(sums, gradients)
            self._added[key] = min(start + step, batch)

    def _accumulate_rows(
        self,
        factors: list[tuple[nn.Module, Rule, Tensor, Tensor]],
        reduction: Entrywise,
        sums: Tensor,
        totals: Any,
    ) -> None:
        """Embeddings: only the rows that an example looks up have a gradient."""
        pairs = [_embedding_rows(module, x, g) for module, _, x, g in factors]
        ids = torch.cat([ids for ids, _ in pairs], 1)
        g = torch.cat([g for _, g in pairs], 1).flatten(0, 1)
        vocabulary = len(sums)
        keys = ids + vocabulary * torch.arange(len(ids), device=ids.device).unsqueeze(1)
        looked_up, position = keys.flatten().unique(return_inverse=True)
        rows = g.new_zeros(len(looked_up), g.shape[-1]).index_add_(0, position, g)
        if totals is not None:
            totals.index_add_(0, ids.flatten(), g)
        sums.index_add_(0, looked_up % vocabulary, reduction.raised(rows))


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    value = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(value, Tensor)
    return value


def _norm(x: Tensor) -> Tensor | float:
    """The norm of a factor; the indices of an embedding are none."""
    return x.norm() if x.is_floating_point() else 0.0


def _cast(use: _Use, like: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors in the accumulator's precision; indices stay integers."""
    assert use.g is not None
    x = use.x.to(like.dtype) if use.x.is_floating_point() else use.x
    return x, use.g.to(like.dtype)


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
