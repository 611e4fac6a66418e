"""Where and how large the cases are run."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.shapes import BERT_BASE, MINILM, TINY, TINYLLAMA, Shape


@dataclass(frozen=True)
class Setting:
    """A device, and whether sizes are real or so small that all cases run in seconds."""

    device: str = "cpu"
    tiny: bool = False

    @property
    def on_cpu(self) -> bool:
        """Whether the processor computes."""
        return self.device == "cpu"

    @property
    def shapes(self) -> list[Shape]:
        """Models that steps are timed on."""
        if self.tiny:
            return [TINY]
        return [MINILM, BERT_BASE] if self.on_cpu else [MINILM, BERT_BASE, TINYLLAMA]

    @property
    def base(self) -> Shape:
        """The model of the cases that take one."""
        return TINY if self.tiny else BERT_BASE

    @property
    def rank(self) -> int:
        """The rank of the masked adapter; LoRA of half the rank has as many trainable values."""
        return 4 if self.tiny else 16

    def rounds(self, number: int) -> int:
        """How often to measure; accelerators are quick."""
        if self.tiny:
            return 2
        return number if self.on_cpu else max(number, 20)
