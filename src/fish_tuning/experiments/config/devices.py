"""The devices that a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Engine = Literal["ddp", "zero2", "fsdp2"]
"""What divides a model among devices: nothing, DeepSpeed ZeRO-2, or `fully_shard`."""

Kind = Literal["cpu", "gpu"]
"""What computes: a processor, or an accelerator that has TRL's kernels."""

MOST = 2**17
"""More devices than anybody trains on."""


@dataclass(frozen=True)
class Devices:
    """How many devices hold a model, what divides it among them, and what they are."""

    count: int = 1
    engine: Engine = "ddp"
    kind: Kind = "cpu"

    @property
    def of_weights(self) -> int:
        """Among how many devices weights are divided."""
        return self.count if self.engine == "fsdp2" else 1

    @property
    def of_optimizer(self) -> int:
        """Among how many devices the optimizer's state is divided."""
        return self.count if self.engine in ("fsdp2", "zero2") else 1

    def __str__(self) -> str:
        one = self.kind.upper()
        return (
            f"one {one}" if self.count == 1 else f"each of {self.count} {one}s with {self.engine}"
        )
