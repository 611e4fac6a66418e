"""The device and the sizes that the cases run with."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.shapes import BERT_BASE, MINILM, SMOLLM2, TINY, TINY_CAUSAL, TINYLLAMA, Shape


@dataclass(frozen=True)
class Setting:
    """A device, and whether sizes are real or so small that all cases run in seconds."""

    device: str = "cpu"
    tiny: bool = False

    @property
    def on_cpu(self) -> bool:
        """Whether the device is the processor."""
        return self.device == "cpu"

    @property
    def shapes(self) -> list[Shape]:
        """The models whose steps are timed."""
        if self.tiny:
            return [TINY]
        return [MINILM, BERT_BASE] if self.on_cpu else [MINILM, BERT_BASE, TINYLLAMA]

    @property
    def base(self) -> Shape:
        """The model of the cases that use only one."""
        return TINY if self.tiny else BERT_BASE

    @property
    def language_model(self) -> Shape:
        """The language model of the cases that use only one."""
        return TINY_CAUSAL if self.tiny else SMOLLM2

    @property
    def rank(self) -> int:
        """The rank of the masked adapter; LoRA of half the rank has as many trainable values."""
        return 4 if self.tiny else 16

    def rounds(self, number: int) -> int:
        """How often to measure; more often on accelerators, which are fast."""
        if self.tiny:
            return 2
        return number if self.on_cpu else max(number, 20)
