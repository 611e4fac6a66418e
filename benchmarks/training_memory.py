"""Peak memory in training, and what optimizer and mask hold."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from benchmarks.contenders import Contender, Way, peers
from benchmarks.measure import peak_memory
from benchmarks.setting import Setting
from benchmarks.shapes import Batch, batch_of
from benchmarks.table import Row, exact, megabytes
from benchmarks.training import DEFAULT, PUBLISHED, ways
from fish_tuning import get_mask
from fish_tuning.mask.files import BITS_FILE
from fish_tuning.sparse.registry import state_of


def memory_of_training(setting: Setting) -> Iterator[Row]:
    """Peak bytes of all contenders: weights, mask, optimizer and activations."""
    shape, rank = setting.base, setting.rank
    batch = batch_of(4, 8, setting.device) if setting.tiny else batch_of(16, 128, setting.device)
    half = f"LoRA r={rank // 2}"
    peaks = {
        name: peak_of_training(way, batch, setting.device)
        for name, way in (ways(shape, rank) | peers(shape, rank // 2)).items()
    }
    size, tokens = batch["input_ids"].shape
    for name, peak in peaks.items():
        if name == half:
            continue
        yield Row(
            f"peak memory in training, {shape.name}, batch {size} x {tokens}: {name}",
            half,
            f"{megabytes(peak)} against {megabytes(peaks[half])}",
            exact((peak - peaks[half]) / 1e6),
            at_most=1 if name in (DEFAULT, PUBLISHED) else None,
            unit=" MB",
            rest=_parts(setting, batch) if name == DEFAULT else "",
        )


def peak_of_training(way: Way, batch: Batch, device: str) -> int:
    """Bytes that a contender's tensors take at the highest point of its first two steps."""
    model = way(device)

    def steps() -> None:
        contender = Contender.of(model)
        for _ in range(2):
            contender.step(batch)

    held = bytes_held(model)
    return held + peak_memory(steps, device)


def bytes_held(model: nn.Module) -> int:
    """Bytes of a model's tensors and of what its mask keeps; shared memory counts once."""
    state = state_of(model)
    holders = chain(model.modules(), [] if state is None else state.groups)
    masked = (value for holder in holders for value in vars(holder).values())
    tensors = chain(model.parameters(), model.buffers(), masked)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if isinstance(tensor, Tensor)
    }
    return sum(storages.values())


def _parts(setting: Setting, batch: Batch) -> str:
    """What a half-selected adapter of twice the rank needs beyond LoRA, in numbers."""
    shape, rank = setting.base, setting.rank
    full, half = ways(shape, rank)[f"LoRA r={rank}"], ways(shape, rank)[f"LoRA r={rank // 2}"]
    entries = (bytes_held(full("cpu")) - bytes_held(half("cpu"))) / 1e6
    modules = sum(name.endswith("lora_A.default") for name, _ in full("meta").named_modules())
    activations = batch["input_ids"].numel() * modules * (rank - rank // 2) * 4 / 1e6
    return (
        f"entries that stay frozen {entries:.2f} MB, the trained values beside their places in "
        f"the storage {entries:.2f} MB, their index {entries:.2f} MB, their numbers when values "
        f"and storage last agreed {entries:.2f} MB, and in {modules} adapters the activations of "
        f"{rank} ranks instead of {rank // 2}, {activations:.2f} MB. All are needed from the "
        "forward pass until the backward pass; a mask that leaves out the entries of A (the "
        "published selection) or whole layers needs no inputs kept for these and takes less than "
        "LoRA"
    )


def optimizer_state(setting: Setting) -> Iterator[Row]:
    """Numbers that AdamW keeps, and what the mask takes in memory and on disk."""
    shape, rank = setting.base, setting.rank
    contender = Contender.of(ways(shape, rank)[DEFAULT](setting.device))
    contender.step(batch_of(4, 8, setting.device))
    states = chain.from_iterable(state.values() for state in contender.optimizer.state.values())
    kept = sum(state.numel() for state in states if state.numel() > 1)
    k = contender.num_trainable
    yield Row(
        f"optimizer state, {shape.name}, {k:,} values",
        "two numbers per value",
        f"{kept:,} against {2 * k:,}",
        exact(kept / (2 * k)),
        at_most=1,
    )
    mask = get_mask(contender.model)
    assert mask is not None
    state = state_of(contender.model)
    assert state is not None
    beside_values = sum(group.index.nbytes + group.agreed.nbytes for group in state.groups)
    yield Row(
        f"mask in memory while training, {shape.name}",
        "",
        f"{megabytes(beside_values)} for {mask.num_trainable:,} selected entries",
        exact(beside_values / mask.num_trainable),
        at_most=4,
        unit=" bytes per entry",
        rest="four bytes for the place of an entry, and four for its number when values and tensor "
        "last agreed, by which writes to either are noticed",
    )
    with TemporaryDirectory() as folder:
        mask.save_pretrained(folder)
        size = (Path(folder) / BITS_FILE).stat().st_size
    yield Row(
        f"mask on disk, {shape.name}",
        "one bit per entry",
        f"{size:,} bytes for {mask.num_entries:,} entries",
        exact(8 * size / mask.num_entries),
        at_most=1.05,
    )
