"""What goes wrong around the library; docs/faults.md lists it with what happens then."""

import errno
import gc
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from peft import PeftModel
from safetensors import SafetensorError
from transformers import TrainerCallback

from fish_tuning import (
    FishMask,
    FishTuningTrainer,
    apply_mask,
    calculate_fisher_information,
    get_mask,
    remove_mask,
)
from fish_tuning.atomic import write_atomically, write_new_folder_atomically
from fish_tuning.experiments.config.load import load_config
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.results import Results, read_results, write_json
from fish_tuning.packing import pack, unpack
from tests import processes
from tests.experiments.sweep_sample import make_sweep
from tests.models import batches_of, examples_for, tiny_bert, with_lora
from tests.training import (
    Classifier,
    arguments,
    checkpointed_run,
    lora_bert,
    points,
    random_mask,
    tensors_of,
    trainer_for,
)

ROOT = Path(__file__).parents[1]


def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# The disk


@pytest.fixture
def saved(tmp_path):
    """A masked model's folder, packed too."""
    model = lora_bert()
    apply_mask(model, random_mask(model))
    model.save_pretrained(tmp_path / "saved")
    pack(tmp_path / "saved", tmp_path / "packed")
    return tmp_path


def full_after(monkeypatch, fraction):
    """Lets each file have that fraction of its bytes, then the disk is full."""
    genuine = Path.write_bytes

    def write_bytes(path, content):
        genuine(path, content[: int(len(content) * fraction)])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)


@pytest.mark.parametrize("fraction", [0, 0.5, 1])
def test_disk_full_in_the_middle_of_a_file(saved, monkeypatch, fraction):
    """Guards earlier files against a write that fails midway, and folders against leftovers."""
    mask = FishMask.from_pretrained(saved / "saved")
    write_json(saved / "results.json", make_sweep())
    before = listing(saved)
    full_after(monkeypatch, fraction)
    other = FishMask({name: ~bits for name, bits in mask.items()})
    for call in (
        lambda: other.save_pretrained(saved / "saved"),
        lambda: pack(saved / "saved", saved / "again"),
        lambda: unpack(saved / "packed", saved / "again"),
        lambda: write_json(saved / "results.json", Results(name="new", config={}, runs=[])),
    ):
        with pytest.raises(OSError, match="No space left on device"):
            call()
    assert listing(saved) == before
    assert FishMask.from_pretrained(saved / "saved") == mask
    assert read_results(saved) == make_sweep()


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from fish_tuning import FishMask, apply_mask, get_mask
from tests.training import lora_bert, random_mask

folder = Path(sys.argv[1])
FishMask({"a": torch.ones(2**18)}).save_pretrained(folder / "mask")
model = lora_bert()
apply_mask(model, random_mask(model))
resource.setrlimit(resource.RLIMIT_FSIZE, (2**13, resource.RLIM_INFINITY))
for call in (
    lambda: FishMask({"a": torch.zeros(2**18)}).save_pretrained(folder / "mask"),
    lambda: model.save_pretrained(folder / "adapter"),
):
    try:
        call()
    except Exception as error:
        print(type(error).__name__, error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
model.save_pretrained(folder / "adapter")
print(FishMask.from_pretrained(folder / "adapter") == get_mask(model))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process")
def test_files_that_the_system_cuts(tmp_path):
    """Guards the same with a limit that the system sets, where the adapter's writer meets it."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED, tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    mask, adapter, again = done.stdout.splitlines()
    assert "File too large" in mask and "File too large" in adapter
    assert again == "True"
    assert FishMask.from_pretrained(tmp_path / "mask").num_trainable == 2**18


# Damaged, foreign and hostile files


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign"])
def test_damaged_adapter(saved, damage):
    """Guards against an adapter that loads in part, or is packed."""
    file = saved / "saved" / "adapter_model.safetensors"
    content = file.read_bytes()
    changed = {"cut": content[:-1], "empty": b"", "foreign": b"PK\x03\x04" + content}[damage]
    file.write_bytes(changed)
    with pytest.raises(SafetensorError):
        PeftModel.from_pretrained(tiny_bert(), saved / "saved")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors was damaged"):
        pack(saved / "saved", saved / "again")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt", "fish_mask.json"])
def test_a_damaged_checkpoint_is_refused(tmp_path, file):
    """Guards against going on from half of a checkpoint, and against a model half loaded."""
    checkpointed_run(tmp_path)
    path = tmp_path / "checkpoint-6" / file
    path.write_bytes(path.read_bytes()[:-40])
    model = lora_bert()
    trainer = trainer_for(model, tmp_path, random_mask(model))
    before = tensors_of(model, random_mask(lora_bert()))
    with pytest.raises((SafetensorError, OSError, RuntimeError, ValueError)):
        trainer.train(resume_from_checkpoint=True)
    if file != "optimizer.pt":  # It is read after the weights.
        assert all(torch.equal(t, before[n]) for n, t in tensors_of(model, before).items())


class Canary:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_pickles_run_nothing(tmp_path, file):
    """Guards a resumed training against a checkpoint that brings code of its own."""
    canary = tmp_path / "canary"
    checkpointed_run(tmp_path)
    checkpoint = tmp_path / "checkpoint-2"
    torch.save(Canary(canary), checkpoint / file)
    model = lora_bert()
    trainer = trainer_for(model, tmp_path, random_mask(model))
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not canary.exists()
    # It would have sung.
    torch.load(checkpoint / file, weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:pathlib.Path.touch [{canary}]",
        "!!python/object/apply:os.system ['touch {canary}']",
        "!!python/object/new:subprocess.Popen [[touch, {canary}]]",
        "!!python/name:os.system",
        "!!python/module:os",
    ],
)
def test_yaml_tags_run_nothing(tmp_path, tag):
    """Guards a config, and an override, against tags that build objects."""
    canary = tmp_path / "canary"
    path = tmp_path / "e.yaml"
    path.write_text(f"model: {tag.format(canary=canary)}\n")
    with pytest.raises(ConfigError, match="line 1: could not determine a constructor"):
        load_config(path)
    path.write_text("model: {name: a}\n")
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        load_config(path, [f"model.name={tag.format(canary=canary)}"])
    time.sleep(0.05)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!int ''\n", "is not valid YAML"),
        ("a: !!bool x\n", "is not valid YAML"),
        ("a: !!timestamp x\n", "is not valid YAML"),
        ("? !!binary aGk=\n: 1\n", "is not valid YAML"),
        ("a: !!int 0x" + "f" * 10_000, "is not valid YAML"),
        ("a: &a {b: [*a]}\n", "is not valid YAML: Circular reference"),
    ],
)
def test_yaml_that_the_parser_stumbles_over(tmp_path, text, message):
    """Guards against a traceback from inside of PyYAML."""
    path = tmp_path / "e.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        load_config(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("link", ["[{}]", "{{<<: [{}]}}"])
def test_yaml_that_grows_without_end(tmp_path, link):
    """Guards memory against a few lines of aliases that stand for billions of values."""
    of_ten = [f"a{i}: &a{i} {link.format(', '.join([f'*a{i - 1}'] * 10))}" for i in range(1, 12)]
    path = tmp_path / "e.yaml"
    path.write_text("\n".join(["a0: &a0 {x: 1}", *of_ten]))
    began = time.monotonic()
    with pytest.raises(ConfigError, match="over 100,000 values once its aliases are expanded"):
        load_config(path)
    assert time.monotonic() - began < 5


def test_links_are_replaced_and_not_followed(saved):
    """Guards what a link leads to: it is neither written nor removed."""
    (saved / "elsewhere").mkdir()
    precious = saved / "elsewhere" / "precious"
    precious.write_text("mine")
    (saved / "link.json").symlink_to(precious)
    write_atomically(saved / "link.json", b"new")
    assert (saved / "link.json").read_text() == "new" and not (saved / "link.json").is_symlink()
    (saved / "folder").symlink_to(saved / "elsewhere")
    with pytest.raises(FileExistsError):
        unpack(saved / "packed", saved / "folder")
    precious_folder = saved / "nowhere"
    (saved / "dangling").symlink_to(precious_folder)
    with pytest.raises(OSError, match="dangling"):
        write_new_folder_atomically(saved / "dangling", {"a": b""})
    assert not precious_folder.exists()
    assert precious.read_text() == "mine" and listing(saved / "elsewhere") == ["precious"]


# Several processes


def dying(rank, model, batches, marks):
    """Process 1 is killed in the middle; what process 0 sees goes into a file."""

    def loader():
        yield batches[0]
        if rank == 1:
            os.kill(os.getpid(), 9)
        yield from batches[1:]

    try:
        calculate_fisher_information(model, loader(), progress=False)
    except Exception as error:
        (marks / "said").write_text(f"{type(error).__name__}: {error}")


def test_a_process_that_dies_while_scoring(tmp_path):
    """Guards against processes that wait for one that is gone, and errors without a cause."""
    model = with_lora(tiny_bert(), init_lora_weights=False)
    batches = batches_of(examples_for(model, 8), 2)
    folder = tmp_path / "together"
    folder.mkdir()
    torch.save((dying, (model, batches, tmp_path)), folder / "call.pt")
    mp.set_forkserver_preload([__name__])
    began = time.monotonic()
    context = mp.start_processes(
        processes._run, (2, folder), 2, join=False, start_method="forkserver"
    )
    for process in context.processes:
        process.join(60)
    assert time.monotonic() - began < 60
    assert context.processes[1].exitcode == -9 and context.processes[0].exitcode is not None
    said = (tmp_path / "said").read_text()
    assert said.startswith("RuntimeError: another process has ended or does not answer")


# Numbers that are not finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_losses_that_diverge(tmp_path, caplog, value):
    """Guards against an adapter of NaNs behind a log that looks well.

    Trainer itself leaves losses that are not finite out of what it logs.
    """
    model = Classifier()
    data = points()
    data[5]["x"] = torch.full((6,), value)
    mask = {name: torch.arange(p.numel()).view(p.shape) % 2 for name, p in model.named_parameters()}
    args = arguments(tmp_path, logging_steps=1)
    trainer = FishTuningTrainer(model=model, args=args, train_dataset=data, mask=mask)
    trainer.train()
    assert all(torch.isfinite(torch.tensor(e.get("loss", 0.0))) for e in trainer.state.log_history)
    (said,) = [message for message in caplog.messages if "Training has diverged" in message]
    count = get_mask(model).num_trainable
    assert re.search(rf"at step \d, \d+ of {count} selected values are not finite", said)


def test_a_training_that_goes_well_is_not_said_to_diverge(tmp_path, caplog):
    """Guards against a warning that nobody can believe."""
    model = lora_bert()
    trainer_for(model, tmp_path, random_mask(model), logging_steps=1).train()
    assert "diverged" not in caplog.text


# The clock


class Back(TrainerCallback):
    """The clock is set back by an hour at every step."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.hours = monkeypatch, 0
        self.genuine = time.time

    def on_step_begin(self, args, state, control, **kwargs):
        self.hours += 1
        hours = self.hours
        self.monkeypatch.setattr(time, "time", lambda: self.genuine() - 3600 * hours)


def test_a_clock_that_is_put_back(tmp_path, monkeypatch):
    """Guards a training, and its result, against the time of day."""
    undisturbed = checkpointed_run(tmp_path / "a")
    model = checkpointed_run(tmp_path / "b", [Back(monkeypatch)])
    for name, tensor in tensors_of(undisturbed, random_mask(lora_bert())).items():
        assert torch.equal(tensor, tensors_of(model, [name])[name])


# Soak


def _cycle(model, mask, inputs, folder):
    apply_mask(model, mask)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    model(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.save_pretrained(folder)
    remove_mask(model)


@pytest.mark.slow
def test_two_thousand_cycles(tmp_path):
    """Guards against hooks, views, graphs, open files or memory that each round leaves behind."""
    model = lora_bert()
    mask = FishMask(random_mask(model))
    inputs = batches_of(examples_for(model, 2), 2)[0]

    def measured(cycles):
        for _ in range(cycles):
            _cycle(model, mask, inputs, tmp_path)
        gc.collect()
        files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
        return len(gc.get_objects()), resident_memory(), (tensors_alive(), files)

    measured(200)
    before = measured(100)
    after = measured(1700)
    # An object per cycle would be 1,700.
    assert after[0] - before[0] < 500
    # A kilobyte per cycle would be 1.7 MB.
    assert after[1] - before[1] < 2**20
    assert after[2] == before[2]


def resident_memory():
    """Bytes of this process that are in memory, where the system tells."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0


def tensors_alive():
    """Tensors, a few of which may hold much memory."""
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
