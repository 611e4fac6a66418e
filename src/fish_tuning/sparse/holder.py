"""What keeps a masked model's tensors up to date with its trainable values.

Each masked module keeps its tensor, as a buffer that is a view of the storage, so that names,
files, merging and generation see the ordinary model. Hooks keep these tensors fresh: in forward
passes, after optimizer steps, when state dicts are saved and loaded.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fish_tuning.distributed import assign
from fish_tuning.engines import after_deepspeed_steps
from fish_tuning.mask.mask import FishMask
from fish_tuning.sparse.idle_layers import leave_out_idle_layers
from fish_tuning.sparse.storage import RESTING, Group, MaskedTensor, grouped, take_out

HOLDER = "fish"
"""The name under which a masked model holds its trainable values."""

_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"


class Holder(nn.Module):
    """The trainable values of a masked model, and the hooks that keep its tensors up to date."""

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], mask: FishMask
    ) -> None:
        super().__init__()
        self.provenance = mask.provenance
        self.shapes = {name: bits.shape for name, bits in mask.items()}
        counts = {name: int(bits.sum()) for name, bits in mask.items()}
        partly = {
            name: parameter
            for name, parameter in parameters.items()
            if name in mask and counts[name] < parameter.numel()
        }
        self.orders, taken = take_out(model, partly)
        self.unselected = [tensor for tensor in taken if counts[tensor.name] == 0]
        self.groups: list[Group] = []
        for kind, tensors in grouped([tensor for tensor in taken if counts[tensor.name] > 0]):
            group = Group(tensors, [mask[tensor.name] for tensor in tensors])
            self.add_module(f"{kind}_{len(self.groups)}", group)
            self.groups.append(group)
        self._rest_anew()
        self.handles = [
            model.register_forward_pre_hook(functools.partial(_before_forward, self)),
            model.register_forward_hook(functools.partial(_after_forward, self), always_call=True),
            model.register_state_dict_pre_hook(self._before_state_dict),
            # torch marks the hook with an attribute, which a bound method does not take.
            model.register_state_dict_post_hook(functools.partial(self._after_state_dict)),
        ]
        self.handles += leave_out_idle_layers(model, mask)
        for module in {module: None for tensor in self._tensors() for module, _ in tensor.owners}:
            self.handles.append(module.register_load_state_dict_pre_hook(self._before_load))
            self.handles.append(module.register_load_state_dict_post_hook(self._after_load))
        # DistributedDataParallel would broadcast them before each forward pass.
        self.ignored_before = getattr(model, _DDP_IGNORES, [])
        ours = [f"{HOLDER}.{name}" for name, _ in self.named_buffers()]
        ours += [key for tensor in taken for key in tensor.keys]
        setattr(model, _DDP_IGNORES, [*self.ignored_before, *ours])

    def forward(self, x: Any) -> Any:
        """Nothing: an `nn.Sequential` that is masked calls all of its modules."""
        return x

    def _tensors(self) -> Iterator[MaskedTensor]:
        """The tensors with trained entries."""
        return chain.from_iterable(group.tensors for group in self.groups)

    def mask(self) -> FishMask:
        bits = {name: torch.ones(shape, dtype=torch.bool) for name, shape in self.shapes.items()}
        for tensor in self.unselected:
            bits[tensor.name].zero_()
        for group in self.groups:
            for tensor in group.tensors:
                flat = bits[tensor.name].zero_().view(-1)
                flat[group.index[tensor.selected].cpu() - tensor.entries.start] = True
        return FishMask(bits, provenance=self.provenance)

    def dissolve(self, model: nn.Module) -> None:
        """Makes every tensor a parameter of its own again and takes the hooks off."""
        for handle in self.handles:
            handle.remove()
        setattr(model, _DDP_IGNORES, self.ignored_before)
        for group in self.groups:
            group.write()
        for tensor in self.unselected:
            tensor.settle()
        for tensor in chain(self._tensors(), self.unselected):
            parameter = nn.Parameter(tensor.resting.detach().clone(), tensor.required_grad)
            for module, attribute in tensor.owners:
                del module._buffers[attribute]
                vars(module).pop(RESTING, None)
                module._parameters[attribute] = parameter
        for module, order in self.orders.items():
            unsorted = dict(module._parameters)
            module._parameters.clear()
            module._parameters.update(
                {name: unsorted.pop(name) for name in order if name in unsorted} | unsorted
            )

    # Freshness: the model's tensors hold the values after every optimizer step, before every
    # forward pass and in every state dict; the values hold what a state dict brought.

    def _rest_anew(self) -> None:
        """Gives the owners plain views of the storage as it is now, wherever it was moved to.

        They are leaves that require gradients, like the parameters they stand for: checkpointing
        without reentrance saves the same tensors when it runs a layer a second time, and the
        gradient of a forward pass that went around the model shows up here.
        """
        self.stale, self.armed = False, False
        for group in self.groups:
            for tensor in group.tensors:
                tensor.rest(group.view(tensor).detach().requires_grad_())
                tensor.resting.register_post_accumulate_grad_hook(
                    _direct_gradient_hook(self, group, tensor)
                )
        _live.add(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # The model's own tensors have been moved or cast one by one before, away from the storage.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for tensor in self.unselected:
            tensor.settle()
        self._rest_anew()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Copies and unpickled models: hooks on tensors do not come along.
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.stale = True

    def _settle(self) -> None:
        """Makes up for what was done to the holder behind its back."""
        for group in self.groups:
            before, now = group.storage.dtype, group.values.dtype
            if before == now:
                continue
            # DeepSpeed casts parameters one by one, by their data, and leaves buffers as they are.
            group.storage = group.storage.to(now)
            for tensor in self.unselected:
                if tensor.resting.dtype == before:
                    tensor.install(tensor.resting.to(now))
                    tensor.settle()
            self.stale = True
        if self.stale:
            self._rest_anew()

    def _write(self) -> None:
        self._settle()
        for group in self.groups:
            group.write()

    def before_forward(self, module: nn.Module) -> None:
        """Brings the tensors up to date; with gradients, lets these reach the values."""
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "a masked model cannot be replicated by torch.nn.DataParallel: start one process "
                "a device with torchrun or accelerate launch, or make one device visible"
            )
        if not torch.is_grad_enabled():
            self._write()
            return
        self._settle()
        if not torch.compiler.is_compiling():
            after_deepspeed_steps(_after_engine_step)
        self.armed = True
        for group in self.groups:
            for tensor, view in zip(group.tensors, group.views(), strict=True):
                tensor.install(view)

    def after_forward(self) -> None:
        """Gives the owners their resting tensors back."""
        for tensor in self._tensors():
            tensor.install(tensor.resting)

    def after_step(self, stepped: set[int]) -> None:
        """Called after an optimizer has stepped the parameters of these ids."""
        for group in self.groups:
            if id(group.values) in stepped:
                group.write()
                # A backward through an older forward pass fails, as it does without a mask.
                torch.autograd.graph.increment_version(group.storage)
                self.armed = False

    def on_direct_gradient(self, group: Group, tensor: MaskedTensor, resting: Tensor) -> None:
        """A gradient that did not pass through the node of a forward pass.

        Reentrant checkpointing runs a layer a second time in backward, when the owners hold the
        resting tensors: its gradients belong to the values. Without a forward pass of the whole
        model before, the caller went around it.
        """
        gradient, resting.grad = resting.grad, None
        assert gradient is not None
        if not group.values.requires_grad:
            return
        if not self.armed:
            raise RuntimeError(
                f"a forward pass went around the masked model: it reached {tensor.name} without "
                "passing through the model that apply_mask was given, so its gradient would be "
                "lost. Call that model itself, not one of its submodules"
            )
        if group.values.grad is None:
            group.values.grad = torch.zeros_like(group.values)
        here = group.index[tensor.selected] - tensor.entries.start
        group.values.grad[tensor.selected] += gradient.reshape(-1)[here]

    def _before_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        self._write()

    def _after_state_dict(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
    ) -> None:
        # Views of one storage look like tied weights to whoever saves the state dict.
        for tensor in self._tensors():
            copy = tensor.resting.detach().clone()
            for key in tensor.keys:
                if prefix + key in state:
                    state[prefix + key] = copy

    def _owned_by(self, module: nn.Module) -> Iterator[tuple[Group, MaskedTensor, str]]:
        for group in self.groups:
            for tensor in group.tensors:
                for owner, attribute in tensor.owners:
                    if owner is module:
                        yield group, tensor, attribute

    @torch.no_grad()
    def _before_load(
        self, module: nn.Module, state: Mapping[str, Any], prefix: str, *args: Any
    ) -> None:
        # The adapters library loads module by module, which ends without the hooks after loading.
        for group, tensor, attribute in self._owned_by(module):
            loaded = state.get(prefix + attribute)
            if loaded is not None and loaded.shape == tensor.resting.shape:
                here = group.index[tensor.selected] - tensor.entries.start
                assign(group.values, tensor.selected, loaded.to(group.storage).reshape(-1)[here])

    @torch.no_grad()
    def _after_load(self, module: nn.Module, incompatible_keys: Any) -> None:
        for group, tensor, attribute in self._owned_by(module):
            loaded = module._buffers[attribute]
            if loaded is not None and loaded is not tensor.resting:
                # load_state_dict(assign=True) puts another tensor in its place.
                tensor.resting.copy_(loaded)
                tensor.install(tensor.resting)
            selected = group.storage[group.index[tensor.selected]]
            assign(group.values, tensor.selected, selected)


def _direct_gradient_hook(
    holder: Holder, group: Group, tensor: MaskedTensor
) -> Callable[[Tensor], None]:
    """Keeps nothing alive: the garbage collector does not see what a tensor's hook refers to."""
    to_holder, to_group, to_tensor = weakref.ref(holder), weakref.ref(group), weakref.ref(tensor)

    def hook(resting: Tensor) -> None:
        holder, group, tensor = to_holder(), to_group(), to_tensor()
        if holder is not None and group is not None and tensor is not None:
            holder.on_direct_gradient(group, tensor, resting)

    return hook


def _no_graph_of_its_own(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that torch.compile makes part of a graph, or leaves alone.

    The hooks of a compiled model lie outside of the graph of its forward pass, which would make
    graphs of their own of them. Inside of a larger compiled function they are part of its graph.
    """
    outside: Callable[..., None] = torch.compiler.disable(hook)
    torch.compiler.substitute_in_graph(outside)(hook)
    return outside


@_no_graph_of_its_own
def _before_forward(holder: Holder, module: nn.Module, args: Any) -> None:
    holder.before_forward(module)


@_no_graph_of_its_own
def _after_forward(holder: Holder, module: nn.Module, args: Any, output: Any) -> None:
    holder.after_forward()


_live: weakref.WeakSet[Holder] = weakref.WeakSet()


def _after_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if _live:
        _after_step({id(p) for group in optimizer.param_groups for p in group["params"]})


def _after_engine_step(model: nn.Module) -> None:
    _after_step({id(p) for p in model.parameters()})


def _after_step(stepped: set[int]) -> None:
    for holder in list(_live):
        holder.after_step(stepped)


register_optimizer_step_post_hook(_after_optimizer_step)


def holder_of(model: nn.Module) -> Holder | None:
    """The holder of a masked model, which may be wrapped."""
    holder = getattr(model, HOLDER, None)
    return holder if isinstance(holder, Holder) else None
