"""FSDP2 through accelerate and Trainers: masked models train and resume as in one process.

accelerate divides models on accelerators only; `tests/fsdp.py` has it do so on CPUs.
"""

import functools
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from transformers import TrainerCallback

from fish_tuning import (
    FishConfig,
    FishMask,
    FishTuningCallback,
    FishTuningTrainer,
    apply_mask,
    get_mask,
)
from fish_tuning import fsdp_plugin as settings_of_fsdp
from tests.fsdp import FLOWS, let_accelerate_divide_on_cpus, of_transformers, trained
from tests.models import examples_for, tiny_llama
from tests.parallel import (
    error_of,
    labelled_alike,
    lora_llama,
    optimizer_for,
    random_mask,
    tensors_of,
)
from tests.processes import in_processes
from tests.test_sharded_model import sharded

ROOT = Path(__file__).parents[1]
KINDS = ["FULL_STATE_DICT", "SHARDED_STATE_DICT"]


def assert_close(actual, expected):
    """To 1e-7: transformers and TRL round logits to float32 in their losses."""
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-7, atol=1e-7, msg=name)


def saved_in(folder):
    """The adapter and the mask that were saved."""
    return load_file(folder / "adapter_model.safetensors"), FishMask.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("flow", FLOWS)
def test_trainers_train_as_one_process(flow, tmp_path):
    """Guards scoring before accelerate divides the model, 20 steps, and what one process saves
    while the others wait."""
    runs = {}
    for count in (1, 2, 4):
        folder = tmp_path / f"{count}"
        settings = {"bf16": False}
        results = in_processes(
            count, tmp_path / f"p{count}", trained, flow, folder, count, settings
        )
        runs[count] = results[0], saved_in(folder / "saved")
        assert all(divided == (count > 1) for *_, divided in results)
        for tensors, mask, *_ in results:
            assert_close(tensors, runs[1][0][0])
            assert mask == runs[1][0][1]
        assert_close(runs[count][1][0], runs[1][1][0])
        assert runs[count][1][1] == runs[1][1][1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_resume(kind, tmp_path):
    """Guards checkpoints without a mask, and values that are loaded as they were divided."""
    settings = {
        "fsdp_config": {"state_dict_type": kind},
        "save_strategy": "steps",
        "save_steps": 10,
    }
    flow = "FishTuningTrainer"
    first = tmp_path / "first"
    (whole, mask, *_), _ = in_processes(2, tmp_path / "a", trained, flow, first, 2, settings)
    assert saved_in(first / "saved")[1] == mask
    checkpoint = str(first / "checkpoint-10")
    for count in (2, 4):
        other = tmp_path / f"{count}"
        results = in_processes(
            count, tmp_path / f"p{count}", trained, flow, other, count, settings, checkpoint
        )
        for tensors, adopted, *_ in results:
            assert_close(tensors, whole)
            assert adopted == mask
    refused = in_processes(
        2, tmp_path / "r", trained_with_other_mask, tmp_path / "other", settings, checkpoint
    )
    for kind_of_error, message in refused:
        assert kind_of_error == "ValueError" and "was trained with another mask" in message


class Snapshots(TrainerCallback):
    """The trained tensors at each evaluation."""

    def __init__(self):
        self.at = {}

    def on_evaluate(self, args, state, control, model, **kwargs):
        mask = get_mask(model)
        self.at[f"checkpoint-{state.global_step}"] = tensors_of(model, mask)


def wait_long(barrier, **options):
    """Time enough for the other process to write what this one looks for next."""
    barrier(**options)
    time.sleep(0.5)


def with_the_best_of_shards(rank, folder):
    let_accelerate_divide_on_cpus()
    if rank == 1:
        dist.barrier = functools.partial(wait_long, dist.barrier)
    torch.manual_seed(0)
    settings = {
        "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"},
        "eval_strategy": "steps",
        "eval_steps": 5,
        "save_strategy": "steps",
        "save_steps": 5,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    }
    snapshots = Snapshots()
    trainer = of_transformers(
        FishTuningTrainer,
        folder,
        2,
        settings,
        fish_config=FishConfig(keep_ratio=0.3),
        eval_dataset=examples_for(tiny_llama(), 8, 1),
        callbacks=[snapshots],
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint).name
    return best, snapshots.at[best], tensors_of(trainer.model, get_mask(trainer.model))


@pytest.mark.slow
def test_the_best_of_sharded_checkpoints_is_loaded(tmp_path):
    """Guards against processes that take different checkpoints for the best, and load a mixture."""
    results = in_processes(2, tmp_path / "p", with_the_best_of_shards, tmp_path / "f")
    for best, then, now in results:
        assert best == results[0][0]
        assert_close(now, then)


def trained_with_other_mask(rank, folder, settings, checkpoint):
    return error_of(
        trained, rank, "callback", folder, 2, settings | {"keep_ratio": 0.2}, checkpoint
    )


KILLED = """
import os, signal, sys
from pathlib import Path
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from tests import fsdp
import torch
import torch.distributed as dist

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 13 and os.environ["RANK"] in killed.split(","):
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

folder, killed = Path(sys.argv[1]), sys.argv[2]
settings = {
    "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"},
    "save_strategy": "steps",
    "save_steps": 5,
    "callbacks": [Kill()],
}
resume = get_last_checkpoint(str(folder)) if folder.exists() else None
rank = int(os.environ["RANK"])
tensors, *_ = fsdp.trained(rank, "FishTuningTrainer", folder, 2, settings, resume)
if rank == 0:
    torch.save((tensors, resume), folder / "result.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["0,1", "1"], ids=["all", "one"])
def test_killed_processes_resume(killed, tmp_path):
    """Guards against processes that wait for one that is gone, and checkpoints without a mask."""
    script = tmp_path / "train.py"
    script.write_text(KILLED, encoding="utf-8")
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    def run(folder, killed):
        return subprocess.run(
            [*launch, script, folder, killed],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    assert run(tmp_path / "whole", "").returncode == 0
    assert run(tmp_path / "half", killed).returncode != 0
    assert time.time() - (tmp_path / "half" / "killed").stat().st_mtime < 60
    assert run(tmp_path / "half", "").returncode == 0
    whole, _ = torch.load(tmp_path / "whole" / "result.pt")
    half, resumed = torch.load(tmp_path / "half" / "result.pt")
    assert resumed.endswith("checkpoint-10")
    assert_close(half, whole)


OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


def state_of(model, optimizer):
    of_model, of_optimizer = get_state_dict(model, optimizer, options=OPTIONS)
    return {"model": of_model, "optimizer": of_optimizer}


def train_own_loop(rank, count, folder, steps, save=False):
    """Trains in a loop of its own, from a checkpoint of torch's if there is one."""
    model = lora_llama().double()
    mask = random_mask(model)
    apply_mask(model, mask)
    if count > 1:
        sharded(model)
    optimizer = optimizer_for(model)
    if folder.exists() and not save:
        parts = state_of(model, optimizer)
        dcp.load(parts, checkpoint_id=folder)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=parts["model"],
            optim_state_dict=parts["optimizer"],
            options=OPTIONS,
        )
    size = 4 // count
    for step in steps:
        batch = labelled_alike(model, step)
        part = {key: value[rank * size : (rank + 1) * size] for key, value in batch.items()}
        model(**part | {"labels": part["input_ids"]}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if save:
        parts = state_of(model, optimizer)
        dcp.save(parts, checkpoint_id=folder)
    return tensors_of(model, mask)


@pytest.mark.slow
def test_distributed_checkpoints_resume(tmp_path):
    """Guards torch's checkpoints of values that other numbers of processes divide."""
    folder = tmp_path / "checkpoint"
    (whole,) = in_processes(1, tmp_path / "one", train_own_loop, 1, tmp_path / "none", range(8))
    in_processes(2, tmp_path / "two", train_own_loop, 2, folder, range(4), True)
    for count in (1, 2, 4):
        for tensors in in_processes(
            count, tmp_path / f"{count}", train_own_loop, count, folder, range(4, 8)
        ):
            assert_close(tensors, whole)


# Refused before anything happens

PLUGIN = {"fsdp_version": 2, "cpu_offload": None, "cpu_ram_efficient_loading": False}


@pytest.mark.parametrize(
    ("plugin", "device", "expected"),
    [
        ({"fsdp_version": 1}, "cpu", r"FSDP1 cannot train a masked model: choose FSDP2"),
        ({"cpu_offload": object()}, "cuda", r"leave out cpu_offload"),
        ({"cpu_ram_efficient_loading": True}, "cpu", r"the first process alone holds the weights"),
    ],
    ids=["FSDP1", "offload", "loading"],
)
def test_settings_of_accelerate_are_refused(plugin, device, expected, monkeypatch):
    """Guards against scores and masks for a model that accelerate will not divide."""
    state = {"fsdp_plugin": SimpleNamespace(**PLUGIN | plugin), "device": torch.device(device)}
    monkeypatch.setattr(AcceleratorState, "_shared_state", state)
    monkeypatch.setattr(settings_of_fsdp, "world", lambda: (0, 2))
    model = lora_llama()
    with pytest.raises(ValueError, match=expected):
        apply_mask(model, random_mask(model))


def test_fsdp1_of_a_trainer_is_refused_where_accelerate_ignores_it():
    model = lora_llama()
    apply_mask(model, random_mask(model))
    arguments = SimpleNamespace(deepspeed_plugin=None, fsdp_plugin_args={"fsdp_version": 1})
    with pytest.raises(ValueError, match=r"FSDP1 cannot .*'version': 2 in a Trainer's fsdp_config"):
        FishTuningCallback().on_init_end(arguments, None, None, model=model)
