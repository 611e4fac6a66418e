"""The examples for several processes, launched in two of them."""

import functools
import os
import runpy
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest
from safetensors.torch import load_file

from fish_tuning import FishMask
from tests.examples.conftest import EXAMPLES
from tests.processes import in_processes

pytestmark = pytest.mark.slow


def assert_a_masked_adapter(folder):
    """As many entries are trained as the example says, and B has left 0 where it may."""
    mask = FishMask.from_pretrained(folder)
    assert mask.num_trainable == round(mask.provenance["keep_ratio"] * mask.num_entries)
    adapter = load_file(folder / "adapter_model.safetensors")
    for name, bits in mask.items():
        tensor = adapter[name.replace(".default.", ".")]
        if "lora_B" in name:
            assert not tensor[~bits].any()
            assert not bits.any() or tensor[bits].any()


def test_fsdp2(language_model, chats, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    options = ["--model", language_model, "--dataset", chats]
    subprocess.run(
        [*torchrun, EXAMPLES / "fsdp2.py", *map(str, options)],
        cwd=tmp_path,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        check=True,
        timeout=300,
    )
    assert_a_masked_adapter(tmp_path / "output" / "fsdp2")


def sft_under_deepspeed(rank, folder, *options):
    """Runs sft.py as `accelerate launch` does with the config, but on the processor, with gloo."""
    os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    # Its communication through shared memory would be compiled now; without it, gloo is used.
    vars(import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None
    from accelerate import PartialState
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    config = EXAMPLES / "deepspeed_zero2.yaml"
    command = ["--config_file", str(config), "--mixed_precision", "no", "sft.py"]
    parsed = launch_command_parser().parse_args(command)
    arguments, defaults, _ = _validate_launch_command(parsed)
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    _, environment = prepare_deepspeed_cmd_env(arguments)
    os.environ.update({n: v for n, v in environment.items() if n.startswith("ACCELERATE_")})
    PartialState(backend="gloo")
    import trl

    settings = {"use_configured_state": True}
    trl.SFTConfig = functools.partial(trl.SFTConfig, accelerator_config=settings)
    os.chdir(folder)
    sys.argv = ["sft.py", *options]
    names = runpy.run_path(str(EXAMPLES / "sft.py"), run_name="__main__")
    return type(names["trainer"].model_wrapped).__name__


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed(language_model, chats, tmp_path):
    options = ["--model", str(language_model), "--dataset", str(chats), "--max-steps", "2"]
    work = tmp_path / "work"
    work.mkdir()
    engines = in_processes(2, tmp_path / "a", sft_under_deepspeed, work, *options)
    assert engines == ["DeepSpeedEngine"] * 2
    assert_a_masked_adapter(work / "output" / "sft")
