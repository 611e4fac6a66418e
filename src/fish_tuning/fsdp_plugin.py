"""The settings with which accelerate and Trainers divide a model (FSDP) once it is masked."""

from typing import Any

from accelerate.state import AcceleratorState
from transformers.modeling_utils import is_fsdp_enabled

from fish_tuning.distributed import world


def check_settings(arguments: Any = None) -> None:
    """Checks that a masked model can be divided as accelerate is set to do it.

    Args:
        arguments: A Trainer's arguments. On CPUs accelerate ignores what they say of FSDP.

    Raises:
        ValueError: It is set to use FSDP1, or to keep an accelerator's parameters on the CPU.
    """
    plugin = _accelerate("fsdp_plugin")
    given = getattr(arguments, "fsdp_plugin_args", None) or {}
    if getattr(plugin, "fsdp_version", given.get("fsdp_version", 2)) == 1:
        raise ValueError(
            "FSDP1 cannot train a masked model: choose FSDP2 (fsdp_version: 2 in accelerate's "
            "config, 'version': 2 in a Trainer's fsdp_config)"
        )
    if plugin is not None and plugin.cpu_offload and _accelerate("device").type != "cpu":
        raise ValueError(
            "FSDP2 with CPU offload keeps the trained values away from the device that computes "
            "with them: leave out cpu_offload (fsdp_offload_params)"
        )


def check_loaded_everywhere() -> None:
    """Checks that every process has the weights of a model that is not divided yet.

    Raises:
        ValueError: accelerate or transformers is set to load them in the first process alone.
    """
    plugin = _accelerate("fsdp_plugin")
    in_first_only = is_fsdp_enabled() or getattr(plugin, "cpu_ram_efficient_loading", False)
    if in_first_only and world()[1] > 1:
        raise ValueError(
            "with FSDP's cpu_ram_efficient_loading the first process alone holds the weights, and "
            "all processes need them to score and mask the model: set it to false "
            "(fsdp_cpu_ram_efficient_loading in accelerate's config)"
        )


def _accelerate(setting: str) -> Any:
    """A setting of accelerate; None if no Accelerator has been made, or it has none of the name."""
    return AcceleratorState._shared_state.get(setting)
