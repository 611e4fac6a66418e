"""Training in several processes, joined by gloo on one machine."""

import gc
import os
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fish_tuning import (
    FishMask,
    apply_mask,
    get_mask,
    remove_mask,
)
from fish_tuning.sparse.apply import masked_parameters
from tests.models import (
    examples_for,
    pad,
)
from tests.parallel import (
    STEPS,
    assert_identical,
    assert_same_weights,
    error_of,
    labelled_alike,
    lora_bert,
    lora_llama,
    optimizer_for,
    random_mask,
    tensors_of,
    train,
    trained_alone,
)
from tests.processes import in_processes

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("gradients", [True, False])
def test_part_of_the_values_is_refused(gradients, caplog):
    """Guards against training under an engine that leaves a process a part of the values."""
    model = lora_bert()
    apply_mask(model, random_mask(model))
    values = masked_parameters(model)[0]
    count = len(values)
    values.data = values.data[:0]
    said = f"holds 0 of {count} trained values: .* not under .*FSDP1"
    batch = pad(examples_for(model, 2))
    with pytest.raises(RuntimeError, match=said) as error, torch.set_grad_enabled(gradients):
        model(**batch)
    # An outer model that is freed raises nothing where nobody could catch it.
    part = model.get_base_model()
    del model, error
    gc.collect()
    (record,) = caplog.records
    assert re.search(said, record.getMessage())
    assert part is not None


# Training


def train_ddp(rank, model, mask, settings):
    apply_mask(model, mask)
    ddp = DistributedDataParallel(model, **settings)
    sent, broadcast = [], []

    def count_gradients(state, bucket):
        sent.append(bucket.buffer().numel())
        work = dist.all_reduce(bucket.buffer().div_(2), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    ddp.register_comm_hook(None, count_gradients)
    whole = dist._broadcast_coalesced

    def count_buffers(group, tensors, *args):
        broadcast.append(sum(tensor.numel() for tensor in tensors))
        return whole(group, tensors, *args)

    dist._broadcast_coalesced = count_buffers
    train(ddp, rank, 2)
    tensors = tensors_of(model, mask)
    remove_mask(model)
    counts = sent, broadcast.copy()
    return tensors, *counts, DistributedDataParallel(model).parameters_to_ignore


@pytest.mark.parametrize("settings", [{}, {"broadcast_buffers": False}])
def test_ddp_trains_as_one_process(settings, tmp_path):
    """Guards against gradients that are not averaged, more than k numbers sent per step, and
    frozen entries broadcast before each forward pass."""
    model = lora_bert()
    mask = random_mask(model)
    one, before = trained_alone(model, mask)
    results = in_processes(2, tmp_path / "a", train_ddp, model, mask, settings)
    assert_same_weights([tensors for tensors, *_ in results], tensors_of(one, mask), before)
    own = sum(buffer.numel() for buffer in model.buffers())
    assert own > 0
    for _, sent, broadcast, ignored in results:
        assert sum(sent) == STEPS * get_mask(one).num_trainable
        assert broadcast == ([] if settings else [own] * STEPS)
        assert not ignored  # After remove_mask.


def train_checkpointed(rank, model, mask):
    apply_mask(model, mask)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    return error_of(train, DistributedDataParallel(model), rank, 2)


@pytest.mark.slow
def test_reentrant_checkpoints_are_refused(tmp_path):
    """Guards against gradients that differ between processes: they reach the values outside of the
    masked model's forward pass, where no engine sees them."""
    model = lora_bert()
    arguments = model, random_mask(model)
    for kind, message in in_processes(2, tmp_path / "a", train_checkpointed, *arguments):
        assert kind == "RuntimeError" and message.endswith("use_reentrant=False")


def train_fsdp(rank, model, mask, broadcast):
    apply_mask(model, mask)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    train(model, rank, 2)
    trained = tensors_of(model, mask)
    state = {name: tensor for name, tensor in model.state_dict().items() if name in mask}
    assert_identical([trained, state])
    state = {name: tensor + 1 for name, tensor in state.items()}
    parameters: list[Any] = masked_parameters(model)  # DTensors
    held = sum(p.to_local().numel() for p in parameters)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast, strict=False)
    set_model_state_dict(model, state if rank == 0 or not broadcast else {}, options=options)
    loaded = tensors_of(model, mask)
    with torch.no_grad():  # Writes the values into the tensors.
        model(**labelled_alike(model, 0))
    return trained, held, loaded, tensors_of(model, mask)


@pytest.mark.parametrize("broadcast", [False, True])
def test_fully_shard_trains_as_one_process(broadcast, tmp_path):
    """Guards against values that are divided when the tensors are written, saved or loaded."""
    model = lora_llama()
    mask = random_mask(model)
    one, before = trained_alone(model, mask)
    results = in_processes(2, tmp_path / "a", train_fsdp, model, mask, broadcast)
    assert_same_weights([trained for trained, *_ in results], tensors_of(one, mask), before)
    assert sum(held for _, held, *_ in results) == get_mask(one).num_trainable
    for trained, _, loaded, written in results:
        assert_identical([{name: tensor + 1 for name, tensor in trained.items()}, loaded, written])


def layers_of(model):
    return model.base_model.model.model.layers


def no_layers(model):
    return []


def train_complete(rank, model, mask, layers):
    """Trains after passes without gradients, which leave the parameters of all modules complete."""
    apply_mask(model, mask)
    for layer in layers(model):
        fully_shard(layer, reshard_after_forward=False)
    fully_shard(model)
    optimizer = optimizer_for(model)
    for step in range(STEPS):
        batch = labelled_alike(model, step)
        with torch.no_grad():
            model(**batch)
            model(**batch)
        part = {key: value[rank * 2 : rank * 2 + 2] for key, value in batch.items()}
        model(**part | {"labels": part["input_ids"]}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tensors_of(model, mask)


@pytest.mark.parametrize("layers", [layers_of, no_layers], ids=["layers", "root"])
def test_fully_shard_trains_what_is_complete(layers, tmp_path):
    """Guards against gradients that reach complete parameters too late to be exchanged: each
    process would train with those of its own examples, or none at all."""
    model = lora_llama()
    mask = random_mask(model)
    one, before = trained_alone(model, mask)
    results = in_processes(2, tmp_path / "a", train_complete, model, mask, layers)
    assert_same_weights(results, tensors_of(one, mask), before)


def train_rounded(rank, model, mask):
    apply_mask(model, mask)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    train(model, rank, 2)
    return tensors_of(model, mask), {p.dtype for p in masked_parameters(model)}


def test_mixed_precision_rounds_nothing_for_good(tmp_path):
    """Guards against frozen entries and values that take the type of complete parameters."""
    model = lora_llama()
    mask = random_mask(model)
    before = tensors_of(model, mask)
    for tensors, dtypes in in_processes(2, tmp_path / "a", train_rounded, model, mask):
        assert dtypes == {torch.float32}
        for name, bits in mask.items():
            assert torch.equal(tensors[name][~bits], before[name][~bits]), name
            trained = tensors[name][bits]
            assert not torch.equal(trained, trained.bfloat16().float()), name


def saved_under_fsdp(rank, model, mask, folder):
    apply_mask(model, mask)
    fully_shard(model)
    model.save_pretrained(folder, is_main_process=rank == 0)


def test_fully_shard_saves_the_head(tmp_path):
    """Guards against tensors of which a process saves its part, since every entry is selected."""
    model = lora_bert()
    mask = random_mask(model)
    in_processes(2, tmp_path / "a", saved_under_fsdp, model, mask, tmp_path / "two")
    apply_mask(model, mask).save_pretrained(tmp_path / "one")
    one, two = (
        load_file(tmp_path / count / "adapter_model.safetensors") for count in ("one", "two")
    )
    assert any("classifier" in name for name in one)
    assert_identical([one, two])
    assert FishMask.from_pretrained(tmp_path / "two") == get_mask(model)


def written_under_fsdp(rank, model, mask):
    """Writes a tensor whose values `fully_shard` has complete while the root's hooks run."""
    apply_mask(model, mask)
    fully_shard(model)
    held = []
    for number in (2.0, 3.0):
        for name in mask:
            attrgetter(name)(model).data.fill_(number)
        for _ in range(2):
            with torch.no_grad():
                model(**labelled_alike(model, 0))
            model.reshard()
        held.append(tensors_of(model, mask))
    return held


def test_fully_shard_keeps_what_is_written(tmp_path):
    """Guards against writing complete values, which are gone when they are divided again."""
    model = lora_llama()
    mask = {name: bits for name, bits in random_mask(model).items() if not bits.all()}
    for held in in_processes(2, tmp_path / "a", written_under_fsdp, model, mask):
        for number, tensors in zip((2.0, 3.0), held, strict=True):
            assert all((tensor == number).all() for tensor in tensors.values())


TRAINER = """
import sys
import torch
from transformers import Trainer, TrainingArguments
from fish_tuning import FishConfig, FishTuningTrainer, get_fish_model
from tests.models import examples_for, tiny_bert, with_lora

folder, batch_size = sys.argv[1], int(sys.argv[2])
rates = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
model = with_lora(tiny_bert(**rates), lora_dropout=0.0)
data = examples_for(model, 13, shortest=6, longest=6)
args = TrainingArguments(
    folder,
    max_steps=6,
    per_device_train_batch_size=batch_size,
    learning_rate=0.01,
    weight_decay=0.1,
    average_tokens_across_devices=False,  # It doubles the loss of a classifier.
    save_strategy="no",
    use_cpu=True,
    report_to="none",
    disable_tqdm=True,
)
loader = Trainer(model=model, args=args, train_dataset=data).get_train_dataloader()
get_fish_model(model, FishConfig(keep_ratio=0.3), loader, progress=False)
# Without a smaller last batch, whose halves would weigh as much as whole ones.
trainer = FishTuningTrainer(model=model, args=args, train_dataset=data[:12])
trainer.train()
trainer.save_model()
if trainer.is_world_process_zero():
    print("processes", args.world_size)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_trainer_under_torchrun(tmp_path):
    """Guards FishTuningTrainer's DDP, and scoring with the Trainer's own loader."""
    script = tmp_path / "train.py"
    script.write_text(TRAINER, encoding="utf-8")
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    for count, batch_size in ((1, 4), (2, 2)):
        done = subprocess.run(
            [*launch, f"--nproc-per-node={count}", script, tmp_path / f"{count}", f"{batch_size}"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert f"processes {count}" in done.stdout
    one, two = (load_file(tmp_path / f"{count}" / "adapter_model.safetensors") for count in (1, 2))
    masks = [FishMask.from_pretrained(tmp_path / f"{count}") for count in (1, 2)]
    assert masks[0] == masks[1]
    assert list(one) == list(two)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
