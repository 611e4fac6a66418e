"""Saved adapters and models for tests of packing, and packed files taken apart."""

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, TrainingArguments

from fish_tuning import (
    FishMask,
    FishTuningTrainer,
    create_mask_from_fisher,
    random_scores,
)
from fish_tuning.packing.packed_file import FORMAT
from tests.models import examples_for, pad, tiny_bert

WEIGHTS = "adapter_model.safetensors"


PACKED = ("README.md", "adapter_config.json", WEIGHTS, "fish_mask.json", "fish_mask.safetensors")


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


SPECIAL = {
    torch.float32: [0x00000000, 0x80000000, 0x7FC00001, 0xFFC00000, 0x7F800001, 0x7F800000],
    torch.bfloat16: [0x0000, 0x8000, 0x7FC1, 0xFFC0, 0x7F81],
    torch.float16: [0x0000, 0x8000, 0x7E01, 0xFE00, 0x7C01],
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def listing(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def base_folder(folder: Path, model=None) -> Path:
    (model if model is not None else tiny_bert(num_hidden_layers=3)).save_pretrained(folder)
    return folder


def new_adapter(base, seed=3, config=None, **settings):
    settings = {"task_type": "SEQ_CLS", "r": 8, "target_modules": ["query", "value"], **settings}
    torch.manual_seed(seed)
    return get_peft_model(base, config or LoraConfig(**settings))


def trained(model, folder: Path, density=0.25, exclude=("modules_to_save",)) -> Path:
    """Trains a random choice of entries for three steps, with weight decay; saves into `folder`."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    mask = create_mask_from_fisher(random_scores(trainable, 0), density, exclude)
    args = TrainingArguments(
        str(folder.parent / "checkpoints"),
        max_steps=3,
        learning_rate=0.02,
        weight_decay=0.1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = FishTuningTrainer(
        model, args, train_dataset=examples_for(model, 12), data_collator=pad, mask=mask
    )
    trainer.train()
    trainer.save_model(str(folder))
    return folder


def load_base(folder: Path, **kwargs):
    return AutoModelForSequenceClassification.from_pretrained(folder, **kwargs)


def random_mask(model, density=0.3) -> FishMask:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return create_mask_from_fisher(random_scores(trainable, 1), density, ["modules_to_save"])


def fine_tuned(base: Path, folder: Path, dtype=torch.float32) -> Path:
    """A model of which 5% of the linear weights, and the head, were trained."""
    model = load_base(base, dtype=dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "classifier" in name or (parameter.dim() == 2 and "layer" in name)
    return trained(model, folder, density=0.05, exclude=["classifier"])


def any_bits(rng, shape, dtype) -> torch.Tensor:
    """Random bits, and many of the numbers that arithmetic does not keep."""
    word = np.dtype(f"<u{dtype.itemsize}")
    bits = rng.integers(0, 2 ** (8 * dtype.itemsize), shape, dtype=word)
    special = rng.choice(np.array(SPECIAL[dtype], word), shape)
    bits = np.where(rng.random(shape) < 0.5, bits, special).astype(word)
    flat = torch.from_numpy(bits.reshape(-1).view(f"i{dtype.itemsize}"))
    return flat.view(dtype).reshape(shape)


def write_folder(folder: Path, tensors, mask: FishMask) -> Path:
    folder.mkdir(parents=True)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes(b'{"any": "bytes \xff\x00\xe9"}\r\n')
    mask.save_pretrained(folder)
    return folder


def parts_of(file: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(file)


def signed(parts, version=1) -> bytes:
    """A packed file of these parts, as anyone can write one."""
    sha256 = hashlib.sha256()
    for name in ("record", "values", "stored", "bits"):
        sha256.update(f"{name}:{len(parts[name])}:".encode() + parts[name].tobytes())
    about = json.dumps({"format_version": version, "sha256": sha256.hexdigest()})
    return safetensors.numpy.save(parts, {FORMAT: about})


def deflated(content: bytes) -> np.ndarray:
    return np.frombuffer(zlib.compress(content), np.uint8)
