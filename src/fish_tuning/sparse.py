"""A mask on a model: the selected entries become its only trainable numbers.

The masked tensors of an adapter lie one behind the other in a flat, frozen ``storage``. The k
selected entries are one trainable vector ``values``; ``index`` says where in the storage they
belong. Each adapter module keeps its tensor, as a buffer that is a view of the storage, so that
names, files, merging and generation see the ordinary adapter. In a forward pass with gradients
one autograd node writes ``values`` into the storage and hands out the views; its backward gathers
the views' gradients at ``index``. Optimizers, engines and counters see k numbers and no more.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fish_tuning.distributed import assign, check_equal, check_maskable, whole
from fish_tuning.mask import FishMask

HOLDER = "fish"
"""The name under which a masked model holds its trainable values."""

GROUP_ENTRIES = 2**22
"""Small tensors share a node up to this size. A node waits for the gradients of all its tensors,
so that a larger group would keep many dense gradients alive at once."""

_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"

# The tensors that transformers' Trainer excludes from weight decay, by its own patterns; a group
# of such tensors has "bias" in its name and so is excluded too.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)


def apply_mask(model: nn.Module, mask: Mapping[str, Tensor]) -> nn.Module:
    """Makes the entries that a mask selects the only trainable ones of its tensors, in place.

    FISH-Tuning (arXiv 2504.04050) equations 5 and 6 multiply gradients by the mask; here the
    frozen entries are no parameters at all. No optimizer, weight decay or momentum can move them,
    optimizer state holds two numbers for each selected entry under AdamW, and counters tell the
    truth. A tensor that is selected whole stays the ordinary parameter it was, and so does every
    parameter that the mask does not name.

    Apply the mask before the optimizer is built, and call the model that was masked: gradients
    of a forward pass that goes around it (a submodule called directly) raise in backward. Where
    torch.distributed has several processes, all of them call, before an engine wraps the model.

    Args:
        model: The model, for instance a `PeftModel`.
        mask: A `FishMask`, or any mapping from parameter names to boolean or 0/1 tensors of the
            parameters' shapes.

    Returns:
        The same model.

    Raises:
        ValueError: The model has a mask already; the mask is of another model (unknown names,
            other shapes); it selects entries of a frozen parameter, or nothing at all; an engine
            wraps the model already, or the processes hold different tensors or masks. The model
            is unchanged.
    """
    check_maskable(model)
    if get_mask(model) is not None:
        raise ValueError("the model has a mask already: call remove_mask(model) first")
    if hasattr(model, HOLDER):
        raise ValueError(
            f"the model has an attribute {HOLDER!r} of its own, the name under which a mask keeps "
            "the trainable values: rename it"
        )
    mask = mask if isinstance(mask, FishMask) else FishMask(mask)
    parameters = dict(model.named_parameters())
    _check_fits(parameters, mask)
    # An engine would send the values alone: what they are written into has to be equal before.
    check_equal(chain((parameters[name] for name in mask), mask.values()))
    model.add_module(HOLDER, _Holder(model, parameters, mask))
    return model


def remove_mask(model: nn.Module) -> nn.Module:
    """Turns the masked tensors back into ordinary, trainable dense parameters, in place.

    Their values stay as trained. An optimizer built before holds the masked values and has to be
    built anew.

    Args:
        model: A model that `apply_mask` has masked.

    Returns:
        The same model.

    Raises:
        ValueError: The model has no mask.
    """
    holder = _holder(model)
    if holder is None:
        raise ValueError("the model has no mask to remove")
    # The model may be wrapped, in torch.compile for instance.
    owner = next(module for module in model.modules() if module._modules.get(HOLDER) is holder)
    holder.dissolve(owner)
    delattr(owner, HOLDER)
    return model


def get_mask(model: nn.Module) -> FishMask | None:
    """The mask on a model, or None; its tensors are made anew at each call."""
    holder = _holder(model)
    return None if holder is None else holder.mask()


def masked_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable vectors of a masked model: together, the selected entries of its mask."""
    holder = _holder(model)
    return [] if holder is None else [group.values for group in holder.groups]


def _holder(model: nn.Module) -> _Holder | None:
    holder = getattr(model, HOLDER, None)
    return holder if isinstance(holder, _Holder) else None


def _check_fits(parameters: Mapping[str, nn.Parameter], mask: FishMask) -> None:
    if unknown := [name for name in mask if name not in parameters]:
        near = get_close_matches(unknown[0], parameters, 1)
        raise ValueError(
            f"the mask names {len(unknown)} of {len(mask)} tensors that are no parameters of this "
            f"model: {_some(unknown)}" + (f" (nearest: {near[0]})" if near else "") + ". Was it "
            "made for another model, or another adapter name?"
        )
    misshapen = [
        f"{name} is {tuple(parameters[name].shape)}, its mask {tuple(bits.shape)}"
        for name, bits in mask.items()
        if parameters[name].shape != bits.shape
    ]
    if misshapen:
        raise ValueError(
            f"{len(misshapen)} tensors have another shape than their mask: {_some(misshapen)}. "
            "Was the mask made for another rank?"
        )
    if mask.num_trainable == 0:
        raise ValueError("the mask selects no entry, so there is nothing to train")
    frozen = [
        name for name, bits in mask.items() if not parameters[name].requires_grad and bits.any()
    ]
    if frozen:
        raise ValueError(
            f"the mask selects entries of {len(frozen)} frozen parameters: {_some(frozen)}. Set "
            "requires_grad on them first (PeftModel.from_pretrained takes is_trainable=True)"
        )


def _some(names: list[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


@dataclass(eq=False)
class _Tensor:
    """One tensor taken from the model's parameters: where it belongs and what it is now."""

    name: str
    owners: list[tuple[nn.Module, str]]
    """Modules and attributes that hold it; several if it is tied."""
    keys: list[str]
    """Its names in the model's state dict: one an owner, more if the owner itself is shared."""
    resting: Tensor
    """What the owners hold outside of a forward pass with gradients."""
    required_grad: bool
    entries: slice = field(default_factory=lambda: slice(0))
    """Its part of the group's storage."""
    selected: slice = field(default_factory=lambda: slice(0))
    """Its part of the group's values and index."""

    def install(self, tensor: Tensor) -> None:
        for module, attribute in self.owners:
            module._buffers[attribute] = tensor

    def settle(self) -> None:
        """Without a storage of its own, it may have been moved, cast or loaded by itself."""
        module, attribute = self.owners[0]
        held = module._buffers[attribute]
        assert held is not None
        self.resting = held
        self.install(held)


class _WriteValues(torch.autograd.Function):
    """values (k,) -> the group's tensors with the values in place; gradients gathered back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: _Group) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.group = group
        group.write()
        return tuple(group.view(tensor) for tensor in group.tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None]:
        group: _Group = ctx.group
        flat = [
            group.storage.new_zeros(tensor.resting.numel()) if g is None else g.reshape(-1)
            for tensor, g in zip(group.tensors, gradients, strict=True)
        ]
        dense = flat[0] if len(flat) == 1 else torch.cat(flat)
        return dense.index_select(0, group.index), None


class _Group(nn.Module):
    """Masked tensors of one device and type that share a storage and a trainable vector."""

    storage: Tensor
    index: Tensor

    def __init__(self, tensors: list[_Tensor], masks: list[Tensor]) -> None:
        super().__init__()
        self.tensors = tensors
        flat, index, entries, selected = [], [], 0, 0
        for tensor, bits in zip(tensors, masks, strict=True):
            flat.append(tensor.resting.detach().reshape(-1))
            index.append(bits.to(flat[-1].device).reshape(-1).nonzero().squeeze(1) + entries)
            tensor.entries = slice(entries, entries := entries + flat[-1].numel())
            tensor.selected = slice(selected, selected := selected + index[-1].numel())
        small = entries < torch.iinfo(torch.int32).max
        self.register_buffer("storage", torch.cat(flat), persistent=False)
        self.register_buffer(
            "index", torch.cat(index).to(torch.int32 if small else torch.int64), persistent=False
        )
        self.values = nn.Parameter(self.storage[self.index])

    def view(self, tensor: _Tensor) -> Tensor:
        return self.storage[tensor.entries].view(tensor.resting.shape)

    @torch.no_grad()
    def write(self) -> None:
        """Brings the storage, and so every tensor of the model, up to date with the values.

        Through .data: further forward passes, with gradients or without, and state dicts may come
        before a backward, and writing the same values again must not invalidate what it needs.
        """
        values = whole(self.values.detach(), len(self.index))
        # scatter_ takes int64 alone; converting and scattering is 50 times the speed of indexing.
        self.storage.data.scatter_(0, self.index.long(), values)

    # The state dict has the tensors under the names of their owners, and nothing of the group.

    def _save_to_state_dict(self, *args: Any) -> None:
        pass

    def _load_from_state_dict(self, *args: Any) -> None:
        pass


class _Holder(nn.Module):
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
        self.orders, taken = _take_out(model, partly)
        self.unselected = [tensor for tensor in taken if counts[tensor.name] == 0]
        self.groups: list[_Group] = []
        for kind, tensors in _grouped([tensor for tensor in taken if counts[tensor.name] > 0]):
            group = _Group(tensors, [mask[tensor.name] for tensor in tensors])
            self.add_module(f"{kind}_{len(self.groups)}", group)
            self.groups.append(group)
        self._rest_anew()
        self.handles = [
            model.register_forward_pre_hook(self._before_forward),
            model.register_forward_hook(self._after_forward, always_call=True),
            model.register_state_dict_pre_hook(self._before_state_dict),
            # torch marks the hook with an attribute, which a bound method does not take.
            model.register_state_dict_post_hook(functools.partial(self._after_state_dict)),
        ]
        for module in {module: None for tensor in self._tensors() for module, _ in tensor.owners}:
            self.handles.append(module.register_load_state_dict_post_hook(self._after_load))
        if hasattr(model, "save_pretrained"):
            # A partial, unlike a bound method of another class's making, can be pickled.
            vars(model)["save_pretrained"] = functools.partial(_save_pretrained, model)
        # DistributedDataParallel would broadcast them before each forward pass.
        self.ignored_before = getattr(model, _DDP_IGNORES, [])
        ours = [f"{HOLDER}.{name}" for name, _ in self.named_buffers()]
        ours += [key for tensor in taken for key in tensor.keys]
        setattr(model, _DDP_IGNORES, [*self.ignored_before, *ours])

    def _tensors(self) -> Iterator[_Tensor]:
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
        vars(model).pop("save_pretrained", None)
        setattr(model, _DDP_IGNORES, self.ignored_before)
        for group in self.groups:
            group.write()
        for tensor in self.unselected:
            tensor.settle()
        for tensor in chain(self._tensors(), self.unselected):
            parameter = nn.Parameter(tensor.resting.detach().clone(), tensor.required_grad)
            for module, attribute in tensor.owners:
                del module._buffers[attribute]
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
                tensor.resting = group.view(tensor).detach().requires_grad_()
                tensor.resting.register_post_accumulate_grad_hook(
                    _direct_gradient_hook(self, group, tensor)
                )
                tensor.install(tensor.resting)
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

    def _write(self) -> None:
        if self.stale:
            self._rest_anew()
        for group in self.groups:
            group.write()

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "a masked model cannot be replicated by torch.nn.DataParallel: start one process "
                "a device with torchrun or accelerate launch, or make one device visible"
            )
        if not torch.is_grad_enabled():
            self._write()
            return
        if self.stale:
            self._rest_anew()
        self.armed = True
        for group in self.groups:
            views = _WriteValues.apply(group.values, group)  # type: ignore[no-untyped-call]
            for tensor, view in zip(group.tensors, views, strict=True):
                tensor.install(view)

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
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

    def on_direct_gradient(self, group: _Group, tensor: _Tensor, resting: Tensor) -> None:
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

    def _after_load(self, module: nn.Module, incompatible_keys: Any) -> None:
        for group in self.groups:
            for tensor in group.tensors:
                for owner, attribute in tensor.owners:
                    if owner is module:
                        self._read(group, tensor, owner._buffers[attribute])

    @torch.no_grad()
    def _read(self, group: _Group, tensor: _Tensor, loaded: Tensor | None) -> None:
        if loaded is not None and loaded is not tensor.resting:
            # load_state_dict(assign=True) puts another tensor in its place.
            tensor.resting.copy_(loaded)
            tensor.install(tensor.resting)
        selected = group.storage[group.index[tensor.selected]]
        assign(group.values, tensor.selected, selected)


def _direct_gradient_hook(
    holder: _Holder, group: _Group, tensor: _Tensor
) -> Callable[[Tensor], None]:
    """Keeps nothing alive: the garbage collector does not see what a tensor's hook refers to."""
    to_holder, to_group, to_tensor = weakref.ref(holder), weakref.ref(group), weakref.ref(tensor)

    def hook(resting: Tensor) -> None:
        holder, group, tensor = to_holder(), to_group(), to_tensor()
        if holder is not None and group is not None and tensor is not None:
            holder.on_direct_gradient(group, tensor, resting)

    return hook


_live: weakref.WeakSet[_Holder] = weakref.WeakSet()


def _after_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if _live:
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for holder in list(_live):
            holder.after_step(stepped)


register_optimizer_step_post_hook(_after_optimizer_step)


def _save_pretrained(self: Any, save_directory: str, *args: Any, **kwargs: Any) -> Any:
    """The model's own save_pretrained, and the mask beside what it writes."""
    result = type(self).save_pretrained(self, save_directory, *args, **kwargs)
    mask = get_mask(self)
    if mask is not None and kwargs.get("is_main_process", True):
        mask.save_pretrained(save_directory)
    return result


def _take_out(
    model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[nn.Module, list[str]], list[_Tensor]]:
    """Makes parameters buffers; also returns the order in which their owners had them."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    taken: dict[str, _Tensor] = {}
    orders: dict[nn.Module, list[str]] = {}
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    for module, prefixes in paths.items():
        for attribute, parameter in list(module._parameters.items()):
            if parameter is None or (name := names.get(id(parameter))) is None:
                continue
            orders.setdefault(module, list(module._parameters))
            resting = parameter.detach()
            tensor = taken.setdefault(name, _Tensor(name, [], [], resting, parameter.requires_grad))
            tensor.owners.append((module, attribute))
            tensor.keys += [f"{path}.{attribute}" if path else attribute for path in prefixes]
            del module._parameters[attribute]
            module.register_buffer(attribute, tensor.resting)
    return orders, list(taken.values())


def _grouped(tensors: list[_Tensor]) -> Iterator[tuple[str, list[_Tensor]]]:
    """Neighbours of one device, type and weight decay, up to GROUP_ENTRIES or one tensor."""
    open_groups: dict[Any, list[_Tensor]] = {}
    for tensor in tensors:
        undecayed = _NO_DECAY.search(tensor.name) or any(
            isinstance(module, nn.LayerNorm) for module, _ in tensor.owners
        )
        key = tensor.resting.device, tensor.resting.dtype, "bias" if undecayed else "weight"
        group = open_groups.setdefault(key, [])
        if group and sum(t.resting.numel() for t in [*group, tensor]) > GROUP_ENTRIES:
            yield key[-1], group
            group = open_groups[key] = []
        group.append(tensor)
    for key, group in open_groups.items():
        yield key[-1], group
