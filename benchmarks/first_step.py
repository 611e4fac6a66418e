"""From files to the first training step, and back to files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

from benchmarks.contenders import Contender, masked
from benchmarks.measure import take_turns
from benchmarks.scoring import plain_pass
from benchmarks.setting import Setting
from benchmarks.shapes import Shape, texts
from benchmarks.table import Row, exact, megabytes, timed
from fish_tuning import pack, unpack

SEED = 0
"""What torch is seeded with before an adapter is drawn."""
FISH = "load, LoRA, score, select, mask, one step"
LORA = "load, LoRA, one step"
FLOOR = "the same and a forward and backward pass over the calibration examples"


def time_to_the_first_step(setting: Setting) -> Iterator[Row]:
    """Masked LoRA and LoRA of half the rank, each from the model's files, 32 texts to score."""
    shape = setting.language_model
    size, tokens = (2, 8) if setting.tiny else (8, 64)
    data = texts(4 * size, size, tokens, setting.device)
    with TemporaryDirectory() as folder:
        shape.build("cpu").save_pretrained(folder)
        load = partial(_lora, folder, shape, setting)

        def ours() -> None:
            Contender.of(masked(load(setting.rank), data)).step(data[0])

        def lora() -> None:
            Contender.of(load(setting.rank // 2)).step(data[0])

        def floor() -> None:
            lora()
            plain_pass(load(setting.rank), data)

        rounds = take_turns(
            {FISH: ours, LORA: lora, FLOOR: floor}, setting.rounds(3), setting.device
        )
    case = f"time to the first step, {shape.name}, {len(data) * size} calibration texts x {tokens}"
    yield timed(case, rounds, FISH, LORA)
    yield timed(
        case,
        rounds,
        FISH,
        FLOOR,
        at_most=1.1,
        rest="squares and sums of the scores, one example more to recognize the loss, the first "
        "batch's comparison with autograd's gradient, and the selection",
    )


def files(setting: Setting) -> Iterator[Row]:
    """What a trained masked adapter takes on disk, beside LoRA with as many trainable values."""
    shape = setting.language_model
    data = texts(4, 4, 8, setting.device)
    with TemporaryDirectory() as base:
        shape.build("cpu").save_pretrained(base)
        sizes = {}
        for name, rank in (("LoRA", setting.rank // 2), ("FISH", setting.rank)):
            model = _lora(base, shape, setting, rank)
            if name == "FISH":
                model = masked(model, data)
            Contender.of(model).step(data[0])
            folder = Path(base) / name
            model.save_pretrained(folder)
            sizes[name] = _bytes(folder)
        packed, unpacked = Path(base) / "packed.safetensors", Path(base) / "unpacked"

        def packing() -> None:
            packed.unlink(missing_ok=True)
            pack(folder, packed, seed=SEED, base_model=base)

        def unpacking() -> None:
            shutil.rmtree(unpacked, ignore_errors=True)
            unpack(packed, unpacked, base_model=base)

        times = take_turns(
            {"pack": packing, "unpack": unpacking, "reading them": partial(_read, folder)},
            setting.rounds(5),
            "cpu",
        )
        sizes["packed"] = packed.stat().st_size
    case = f"files of a trained adapter, {shape.name}, FISH of r={setting.rank}"
    for name, size in (("adapter and mask", sizes["FISH"]), ("packed", sizes["packed"])):
        yield Row(
            f"{case}: {name}",
            f"LoRA r={setting.rank // 2}",
            f"{megabytes(size)} against {megabytes(sizes['LoRA'])}",
            exact(size / sizes["LoRA"]),
        )
    for name in ("pack", "unpack"):
        yield timed(case, times, name, "reading them")


def _lora(folder: str, shape: Shape, setting: Setting, rank: int) -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=shape.dtype)
    config = LoraConfig(task_type=shape.task, r=rank, target_modules=[*shape.targets])
    model = model.to(setting.device).train()
    torch.manual_seed(SEED)
    return get_peft_model(model, config)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _read(folder: Path) -> None:
    for path in folder.iterdir():
        path.read_bytes()
