"""The k highest of many scores, and a mask on a model of a billion parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.contenders import lora
from benchmarks.measure import peak_memory, take_turns
from benchmarks.setting import Setting
from benchmarks.shapes import TINY, TINYLLAMA
from benchmarks.table import Row, Spread, exact, megabytes, seconds, timed
from benchmarks.training import half_mask
from fish_tuning import apply_mask, create_mask_from_fisher, remove_mask

RADIX = "radix selection"
READ = "one read of the data"
TOPK = "torch.topk"


def top_k(setting: Setting) -> Iterator[Row]:
    """A quarter of 10^9 scores, and of 10^8, which torch.topk has the memory for."""
    for size in (10**4, 10**5) if setting.tiny else (10**8, 10**9):
        generator = torch.Generator(setting.device).manual_seed(0)
        pool = torch.rand(size, generator=generator, device=setting.device).square_()
        select = partial(create_mask_from_fisher, {"scores": pool}, 0.25)
        contenders: dict[str, Callable[[], object]] = {RADIX: select, READ: pool.sum}
        if size <= 10**8:
            contenders[TOPK] = partial(pool.topk, size // 4, sorted=False)
        name = f"top {size // 4:,} of {size:,} scores"
        rounds = take_turns(contenders, setting.rounds(3), setting.device)
        for other in (READ, TOPK):
            if other in contenders:
                yield timed(name, rounds, RADIX, other)
        peak = pool.nbytes + peak_memory(select, setting.device)
        yield Row(
            f"{name}: peak memory",
            "the scores",
            f"{megabytes(peak)} against {megabytes(pool.nbytes)}",
            exact(peak / pool.nbytes),
            at_most=1.3,
        )


def application(setting: Setting) -> Iterator[Row]:
    """Applying a mask of half the entries, and removing it."""
    shape, rank = (TINY, 4) if setting.tiny else (TINYLLAMA, 32)
    # Only the adapter has real memory: a mask does not touch what it does not name.
    model = lora(shape, rank, "meta")
    for name, module in model.named_modules():
        if "lora_" in name and not list(module.children()) and list(module.parameters()):
            module.to_empty(device=setting.device)
    mask = half_mask(model)
    mask = {name: bits for name, bits in mask.items() if "lora_" in name}

    def apply_and_remove() -> None:
        apply_mask(model, mask)
        remove_mask(model)

    rounds = take_turns({"apply": apply_and_remove}, setting.rounds(7), setting.device)
    times = Spread.of(rounds.seconds["apply"])
    yield Row(
        f"applying and removing a mask, {shape.name}, LoRA r={rank}",
        "",
        f"{seconds(times.median)} for {sum(bits.numel() for bits in mask.values()):,} entries",
        times,
        at_most=1,
        unit=" s",
        rest="finding the selected positions and copying the adapter into flat storage",
    )
