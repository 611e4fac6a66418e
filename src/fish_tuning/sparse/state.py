"""The state of a masked model: its tensors, and what happens to them around a forward pass."""

from __future__ import annotations

import copy
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._guards import detect_fake_mode

from fish_tuning.mask.mask import FishMask
from fish_tuning.masked_tensors import zero3
from fish_tuning.masked_tensors.parameters import (
    Orders,
    cast_unselected,
    find_tensors,
    freeze_parameter,
    restore_parameter,
    split_parameter,
    take_in_unselected,
)
from fish_tuning.masked_tensors.reconcile import check_conflicts, fits, reconcile, take_in_replaced
from fish_tuning.masked_tensors.sharded import check_whole, is_sharded, note_shards
from fish_tuning.masked_tensors.sharding import check_not_cast, let_sharding_find_values
from fish_tuning.masked_tensors.storage import Group, grouped
from fish_tuning.masked_tensors.structure import Edge, are_gone, is_unchanged, locate
from fish_tuning.masked_tensors.tensors import MaskedTensor, View
from fish_tuning.sparse import ddp
from fish_tuning.sparse.calls import is_being_called, untraced
from fish_tuning.sparse.idle_layers import IdleLayers
from fish_tuning.sparse.registry import STATE, forget, remember

logger = logging.getLogger(__name__)


class MaskState:
    """What the masks of a model select, and how its tensors follow its values.

    It is a plain object in the model's `__dict__`, not a module: a masked `nn.Sequential` keeps
    its length and its last element. Copies and pickles of the model have a state of their own.
    """

    def __init__(self, root: nn.Module) -> None:
        self.tensors: list[MaskedTensor] = []
        self.groups: list[Group] = []
        self.by_module: dict[nn.Module, list[MaskedTensor]] = {}
        self.unselected: list[MaskedTensor] = []
        self.orders: Orders = {}
        self.idle = IdleLayers()
        self.uninstallers: list[Callable[[], None]] = []
        """Calls that take back hooks and patches; none keeps the model itself alive."""
        self.ignored: set[str] = set()
        """Names that DistributedDataParallel ignores since the model is masked."""
        self.edges: list[Edge] = []
        self.running: int | None = None
        """The id of the module whose forward pass is running."""
        self.thread = 0
        """The thread in which it runs."""
        self.differentiable: list[View] = []
        """The views that differ from their leaves during that pass."""
        self.steps_without_values = 0
        self.has_warned_of_load = False
        let_sharding_find_values()
        self._watch(root)

    # What is masked

    def add(self, root: nn.Module, mask: FishMask) -> list[MaskedTensor]:
        """Mask further tensors of the model and return them."""
        found = find_tensors(root, mask, mask.provenance)
        parts = []
        for tensor, bits in found:
            if tensor.is_split:
                parts.append(split_parameter(tensor, bits, self.orders))
            elif tensor.is_frozen:
                freeze_parameter(tensor, self.orders)
        self.groups += grouped(parts)
        new = [tensor for tensor, _ in found]
        self.tensors += new
        self.idle.add(root, mask)
        self._index(root)
        return new

    def _index(self, root: nn.Module) -> None:
        self.edges = locate(root, self.tensors)
        self.unselected = [tensor for tensor in self.tensors if tensor.is_frozen]
        self.by_module = {}
        for tensor in self.tensors:
            for place in tensor.places:
                self.by_module.setdefault(place.module, []).append(tensor)

    def mask(self, belongs: Callable[[str], bool] | None = None) -> FishMask | None:
        """The mask of the model, or of the tensors whose names belong to what is asked for."""
        root = self.root()
        if root is not None and not is_unchanged(root, self.edges):
            self._index(root)
        bits_by_name, provenances = {}, []
        for tensor in self.tensors:
            bits = tensor.bits()
            for view, place in tensor.views_and_places():
                if place.in_mask and (belongs is None or belongs(place.name)):
                    bits_by_name[place.name] = view.of(bits).contiguous()
                    if tensor.provenance not in provenances:
                        provenances.append(tensor.provenance)
        if not bits_by_name:
            return None
        provenance = provenances[0] if len(provenances) == 1 else {"masks": provenances}
        return FishMask(bits_by_name, provenance=provenance)

    # What leaves

    def release(self, tensors: Iterable[MaskedTensor]) -> None:
        """Make tensors ordinary parameters again, with the numbers that they have now.

        Those that no longer fit their mask become parameters with what their modules hold.

        Raises:
            RuntimeError: An engine has divided the model among processes.
        """
        leaving = dict.fromkeys(tensors)
        if not leaving:
            return
        check_whole((t.values for t in leaving if t.is_split), "a mask cannot be taken off")
        groups = {tensor.group: None for tensor in leaving if tensor.group is not None}
        touched = [tensor for group in groups for tensor in group.tensors]
        self._take_in([t for t in touched if t not in leaving or fits(t)], may_tie=True)
        groups = {tensor.group: None for tensor in touched if tensor.group is not None}
        remaining = {}
        for group in groups:
            for tensor in group.tensors:
                if tensor not in leaving or fits(tensor):
                    reconcile(group, tensor)
            parts = list(group.parts())
            for part in parts:
                if part.tensor in leaving:
                    requires_grad = part.tensor.values.requires_grad
                    restore_parameter(part.tensor, part.flat.clone(), requires_grad, self.orders)
            remaining[group] = grouped(part for part in parts if part.tensor not in leaving)
        self._replace_groups(remaining)
        for tensor in leaving:
            if tensor.is_frozen:
                if fits(tensor):
                    self._take_in([tensor], may_tie=True)
                view = tensor.views[0]
                memory = view.flatten(view.leaf).clone()
                restore_parameter(tensor, memory, tensor.was_trainable, self.orders)
        self.tensors = [tensor for tensor in self.tensors if tensor not in leaving]
        self.idle.release(place.module for tensor in leaving for place in tensor.places)
        root = self.root()
        if not self.tensors:
            self._uninstall()
        elif root is not None:
            self._index(root)

    def dissolve(self) -> None:
        """Take all masks off: every tensor is a parameter again, no hook and no patch is left."""
        self.release(self.tensors)

    def _uninstall(self) -> None:
        for uninstall in self.uninstallers:
            uninstall()
        self.uninstallers.clear()
        forget(self)
        if (root := self.root()) is not None:
            del vars(root)[STATE]
            for name, value in list(vars(root).items()):
                if isinstance(value, functools.partial) and self in value.args[:1]:
                    del vars(root)[name]
            ddp.stop_ignoring(root, self.ignored)

    def ignore_in_ddp(self, root: nn.Module) -> None:
        """Keep DistributedDataParallel from broadcasting tensors of which nothing is trained."""
        names = (place.name for tensor in self.unselected for place in tensor.places)
        self.ignored |= ddp.ignore(root, names)

    # Up to date: values and tensors hold the same numbers

    def update(self, module: nn.Module | None = None) -> None:
        """Bring the tensors of the model, or of one of its modules, up to date.

        During a forward pass they are already.
        """
        if self._is_running():
            return
        tensors = self.tensors if module is None else self.by_module.get(module, [])
        self._take_in(tensors)
        if module is None:
            for group in self.groups:
                reconcile(group)
            return
        for tensor in tensors:
            if tensor.group is not None:
                reconcile(tensor.group, tensor)

    def agree_on_training(self) -> None:
        """Have values and tensors agree on which of them require gradients."""
        for group in self.groups:
            group.agree_on_training()

    def show_values(self) -> None:
        """Have modules list values as their parameters, as they are and with their flags.

        Somebody may have assigned tensors since, such as `tie_weights`.
        """
        if not self._is_running():
            split = [t for g in self.groups if not g.is_intact() for t in g.tensors if fits(t)]
            self._take_in(split, may_tie=True)
        self.agree_on_training()

    def update_intact(self) -> None:
        """Bring tensors up to date where nothing was replaced, in the middle of any change.

        Values that other processes share are left alone, and so are all while torch.export runs
        with tensors that have no data.
        """
        if detect_fake_mode() is not None:
            return
        for group in self.groups:
            if all(type(v) is nn.Parameter for v in group.trained()) and group.is_intact():
                reconcile(group)

    def _take_in(self, tensors: list[MaskedTensor], may_tie: bool = False) -> None:
        """Take in what was moved, cast or replaced."""
        if tensors is self.tensors:
            split = [t for group in self.groups if not group.is_intact() for t in group.tensors]
        else:
            split = [t for t in tensors if t.is_split]
        replaced = take_in_replaced(split, () if may_tie else self.tensors)
        self._replace_groups(replaced)
        take_in_unselected(
            self.unselected if tensors is self.tensors else [t for t in tensors if t.is_frozen]
        )
        for group, new in replaced.items():
            if group.only_values_cast:
                cast_unselected(self.unselected, group.storage.dtype, new[0].storage.dtype)

    def _replace_groups(self, replaced: dict[Group, list[Group]]) -> None:
        for group, new in replaced.items():
            self.groups.remove(group)
            self.groups += new

    def check(self, *, alone: bool = False) -> None:
        """Check, before anything is saved, that the masks fit and no tensor has two truths."""
        if (root := self.root()) is not None:
            self._index(root)
        # A process that calls alone cannot bring divided values together.
        if not (alone and any(is_sharded(v) for group in self.groups for v in group.trained())):
            self.update()
        check_conflicts(self.groups)

    # The forward pass

    def before_forward(self, module: nn.Module) -> None:
        """Bring the tensors up to date; with gradients, let these reach the values."""
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "a masked model cannot be replicated by torch.nn.DataParallel: start one process "
                "per device with torchrun or accelerate launch, or make only one device visible"
            )
        if self.running == id(module):
            self._end_pass()  # It was interrupted: no module calls itself.
        if self._is_running() or torch.compiler.is_exporting():
            # torch.export lists modules first, which brings the tensors up to date.
            return
        if torch.jit.is_tracing():
            with untraced():
                self.update()
                self.running, self.thread = id(module), threading.get_ident()
                for group in self.groups:
                    group.version = group.writes()
                    self.differentiable += group.install_constants()
            return
        root = self.root()
        if not torch.compiler.is_compiling():
            if root is not None and not is_unchanged(root, self.edges):
                if module is not root and are_gone(root, self.tensors):
                    return  # Another PeftModel has put its adapter in their place.
                self._index(root)
            if root is not None and dist.is_available() and dist.is_initialized():
                dtypes = note_shards([root, *(child for _, _, child in self.edges)])
                check_not_cast(root, self.tensors, dtypes)
            self._take_in(self.tensors)
            self.agree_on_training()
            zero3.gather(self.groups)
            self.idle.look()
            self.thread = threading.get_ident()
        self.idle.running = True
        for group in self.groups:
            reconcile(group)
            group.version = group.writes()
        self.running = id(module)
        if torch.is_grad_enabled():
            for group in self.groups:
                self.differentiable += group.install_differentiable()

    def after_forward(self, module: nn.Module) -> None:
        """Give the modules their leaves back."""
        if self.running == id(module):
            self._end_pass()
            if not torch.compiler.is_compiling():
                # Constrained OFT projects its weights in its forward pass.
                for group in [g for g in self.groups if g.writes() != g.version]:
                    reconcile(group)

    def _end_pass(self) -> None:
        self.running = None
        self.idle.end_pass()
        for view in self.differentiable:
            view.install(view.leaf)
        self.differentiable = []

    def _is_running(self) -> bool:
        """Whether a forward pass is under way; ends one that was interrupted.

        PyTorch calls the hooks after a forward pass if it raised an Exception, but not if it ended
        with a KeyboardInterrupt or SystemExit.
        """
        if self.running is None:
            return False
        if torch.compiler.is_compiling() or self.thread != threading.get_ident():
            return True
        if is_being_called(self.running):
            return True
        self._end_pass()
        return False

    def before_step(self) -> None:
        """Take in what was written to a tensor before a part of the model was called alone."""
        if any(group.was_bypassed for group in self.groups):
            self.update()
        for group in self.groups:
            group.was_bypassed = False

    def after_step(self, stepped: set[int]) -> None:
        """Bring the tensors up to date after an optimizer has stepped parameters of these ids."""
        if groups := [g for g in self.groups if any(id(v) in stepped for v in g.trained())]:
            self.steps_without_values = -1
            zero3.gather(self.groups)
            self.update()
            for group in groups:
                group.note_write()
        elif self.steps_without_values >= 0 and any(
            v.grad is not None for group in self.groups for v in group.trained()
        ):
            # The first may be a step of one of several optimizers, before that of another.
            self.steps_without_values += 1
            if self.steps_without_values == 2:
                logger.warning(
                    "The trained values of a mask have gradients, but no optimizer holds any of "
                    "them, so they stay as they are: build the optimizer after the model is masked"
                )

    # Copies

    def _watch(self, root: nn.Module) -> None:
        """Take the masks off when the model that was masked is gone and its modules live on."""
        self.root = weakref.ref(root)
        finalizer = weakref.finalize(root, _dissolve, weakref.ref(self))
        finalizer.atexit = False
        remember(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "root": self.root(), "running": None, "differentiable": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for group in self.groups:
            group.attach()
        self._watch(state["root"])

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskState:
        # Where a part of the model is copied, its copy has no root. What stands for it is gone
        # when the copy is done, which takes the mask off the copy.
        if (root := self.root()) is not None:
            memo.setdefault(id(root), _NoRoot())
        state: MaskState = object.__new__(type(self))
        memo[id(self)] = state
        state.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return state


class _NoRoot:
    """Stands for the root of a model of which a part is copied."""


def _dissolve(to_state: weakref.ref[MaskState]) -> None:
    if (state := to_state()) is None:
        return
    try:
        state.dissolve()
    except RuntimeError as error:
        # Python only prints what is raised while it frees an object.
        logger.warning("a freed model's mask stays on the parts of it that are left: %s", error)
