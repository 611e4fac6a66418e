"""Models that DDP, FSDP or DeepSpeed wraps, or that `device_map` spreads over devices."""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fish_tuning.arguments import check_type
from fish_tuning.fsdp_plugin import check_loaded_everywhere, check_settings
from fish_tuning.parts import are_rows, is_divided
from fish_tuning.sharded_model import ShardedModel


def check_model(model: object) -> None:
    """Checks that an argument is a model.

    Raises:
        TypeError: It is something else, such as a model's name.
    """
    wanted = "a model, an nn.Module"
    if isinstance(model, str):
        wanted += f", such as AutoModelForSequenceClassification.from_pretrained({model!r})"
    check_type("model", model, nn.Module, wanted)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a DistributedDataParallel wrapper, or the model itself.

    Raises:
        TypeError: It is not a model.
        ValueError: An engine other than `fully_shard` (FSDP2) has divided the parameters among the
            processes, or DeepSpeed has already built its optimizer from them, or only the first
            process has loaded them.
    """
    check_model(model)
    model = model.module if isinstance(model, DistributedDataParallel) else model
    if any(is_in_zero_3(parameter) for parameter in model.parameters() if parameter.requires_grad):
        raise ValueError(
            "DeepSpeed ZeRO-3 has divided what is to be trained among the processes: score and "
            "mask an adapter before the engine takes the model; to select from the model's own "
            "weights, load it before there is a config of stage 3, with which from_pretrained "
            "divides it (TrainingArguments, HfDeepSpeedConfig), or divide it with fully_shard"
        )
    if (engine := _dividing_engine(model)) is not None:
        raise ValueError(
            f"{engine} has divided the model's parameters among the processes: shard it with "
            "fully_shard (FSDP2), or score and mask the model before it is sharded"
        )
    if _held_by_deepspeed(model):
        raise ValueError(
            "DeepSpeed has already built its optimizer from the model's parameters: score and "
            "mask the model before you prepare it"
        )
    if not is_sharded(model):
        check_loaded_everywhere()
    return model


def check_maskable(model: nn.Module) -> None:
    """Checks that no engine has wrapped or sharded the model yet, and that FSDP can do so later.

    Raises:
        ValueError: An engine has wrapped or sharded it, or accelerate is set to divide it in a way
            that a masked model does not allow.
    """
    inner = unwrapped(model)
    if is_sharded(inner):
        raise ValueError(
            "fully_shard has divided the model's parameters among the processes: build the model "
            "again, and mask it before it is sharded"
        )
    if inner is not model:
        raise ValueError(
            "DistributedDataParallel knows only the parameters that it found when it wrapped the "
            "model: mask the model first, then wrap it"
        )
    check_settings()


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has divided parameters of a model among the processes."""
    return any(map(is_divided, model.parameters())) or bool(ShardedModel(model).parameters)


def device_of(model: nn.Module) -> torch.device:
    """The device that a model takes its input on: that of its first parameter in memory.

    With `device_map`, accelerate's hooks load offloaded parameters there when their module runs,
    and move activations from one device to the next.
    """
    in_memory = (p.device for p in model.parameters() if not p.is_meta)
    return next(in_memory, torch.device("meta"))


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast is set to on a kind of device, if it is on."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def check_in_memory(tensors: Mapping[str, Tensor]) -> None:
    """Checks that none of the tensors is offloaded: offloaded tensors cannot be trained.

    Raises:
        ValueError: Some are offloaded.
    """
    offloaded = [name for name, tensor in tensors.items() if tensor.is_meta]
    if offloaded:
        raise ValueError(
            f"{len(offloaded)} trainable tensors are offloaded (on the meta device), the first of "
            f"them {offloaded[0]}: give their modules a device in device_map, or put the adapter "
            "on modules that have one (target_modules, layers_to_transform)"
        )


def follow_deepspeed(*wrappers: tuple[str, Callable[[nn.Module, Any], Any]]) -> None:
    """Has functions see what methods of every DeepSpeed engine return.

    Does nothing while DeepSpeed is not imported, and nothing more when called again with the same
    functions.

    Methods are wrapped because DeepSpeed offers no hooks. ZeRO steps its own copies of the
    parameters with an ordinary optimizer, whose hooks do not see the model; the engine writes the
    new values into the model's parameters afterwards.

    Args:
        *wrappers: Names of methods, each with a function of the engine's model and the method's
            result. What it returns is returned in place of that result.
    """
    if (engine := _deepspeed_engine()) is not None:
        for name, follow in wrappers:
            _wrap(engine, name, follow)


@functools.cache
def _wrap(engine: Any, name: str, follow: Callable[[nn.Module, Any], Any]) -> None:
    method = getattr(engine, name)

    @functools.wraps(method)
    def call_and_follow(self: Any, *args: Any, **kwargs: Any) -> Any:
        return follow(self.module, method(self, *args, **kwargs))

    setattr(engine, name, call_and_follow)


def _deepspeed_engine() -> Any:
    """DeepSpeed's engine class if the program has imported it: importing takes seconds."""
    return getattr(sys.modules.get("deepspeed.runtime.engine"), "DeepSpeedEngine", None)


def _held_by_deepspeed(model: nn.Module) -> bool:
    engine = _deepspeed_engine()
    if engine is None:
        return False
    # ZeRO records on each parameter where its copy is.
    has_copies = any(hasattr(parameter, "_hp_mapping") for parameter in model.parameters())
    return has_copies or isinstance(model, engine)


def is_in_zero_3(parameter: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 holds a parameter."""
    return hasattr(parameter, "ds_id")


def is_away(parameter: Tensor) -> bool:
    """Whether this process holds no more than DeepSpeed ZeRO-3's slice of a parameter."""
    return parameter.numel() == 0 and is_in_zero_3(parameter)


def _dividing_engine(model: nn.Module) -> str | None:
    """PyTorch's engine that has divided the parameters, if it is not `fully_shard`."""
    parameters = list(model.parameters())
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FullyShardedDataParallel

        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            return "FullyShardedDataParallel"
        by_rows = {id(p) for p in ShardedModel(model).parameters if are_rows(p)}
        if any(is_divided(p) and id(p) not in by_rows for p in parameters):
            return "tensor parallelism, or fully_shard along another dimension than the first,"
    return None
