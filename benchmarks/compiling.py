"""torch.compile with a mask and without."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch._dynamo.pgo import reset_code_state
from torch._dynamo.utils import counters

from benchmarks.contenders import Contender, Way, fish, lora
from benchmarks.measure import take_turns
from benchmarks.setting import Setting
from benchmarks.shapes import TINY, batch_of
from benchmarks.table import Row, exact, timed


def compiling(setting: Setting) -> Iterator[Row]:
    """Graphs after steps and evaluations with two sizes of batches; on an accelerator, time."""
    # Two layers give the same graphs as twelve.
    ways: dict[str, Way] = {"FISH": partial(fish, TINY, 4), "LoRA": partial(lora, TINY, 4)}
    graphs, breaks = {}, {}
    for name, way in ways.items():
        contender = Contender.of(way(setting.device))
        # The very first call determines the model's loss function, which the graphs depend on.
        contender.step(batch_of(4, 8, setting.device))
        # A reset alone does not forget which sizes have varied.
        torch._dynamo.reset()
        reset_code_state()
        counters.clear()
        contender.model.compile(backend="aot_eager")
        for examples in (4, 4, 6, 6):
            batch = batch_of(examples, 8, setting.device)
            contender.step(batch)
            with torch.no_grad():
                contender.model(**batch)
        graphs[name] = counters["stats"]["unique_graphs"]
        breaks[name] = sum(counters["graph_break"].values())
    torch._dynamo.reset()
    yield Row(
        f"torch.compile: graphs of {TINY.name}, two batch sizes, with and without gradients",
        "LoRA",
        f"{graphs['FISH']} (graph breaks: {breaks['FISH']}) against {graphs['LoRA']} "
        f"(graph breaks: {breaks['LoRA']})",
        exact(graphs["FISH"] / graphs["LoRA"]),
        at_most=1,
    )
    if setting.on_cpu:
        return
    shape, batch = setting.base, batch_of(32, 128, setting.device)
    contenders = {
        "compiled FISH": Contender.of(fish(shape, setting.rank, setting.device)),
        "compiled LoRA": Contender.of(lora(shape, setting.rank, setting.device)),
    }
    for contender in contenders.values():
        contender.model.compile()
    rounds = take_turns(
        {name: partial(each.step, batch) for name, each in contenders.items()},
        setting.rounds(20),
        setting.device,
        warmup=3,
    )
    yield timed(f"training step, {shape.name}", rounds, "compiled FISH", "compiled LoRA", at_most=1)
