"""PEFT encodes one prompt per batch and repeats it for each example."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft import PeftModel, PeftType
from torch import Tensor, nn

_REPEATED = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)


def prompted_models(model: nn.Module) -> list[PeftModel]:
    """The PEFT models in a model that have a trained prompt."""
    return [
        module
        for module in model.modules()
        if isinstance(module, PeftModel)
        and module.active_peft_config.peft_type in _REPEATED
        and any(p.requires_grad for p in module.prompt_encoder.parameters())
    ]


@contextmanager
def one_prompt(prompted: Sequence[PeftModel]) -> Iterator[None]:
    """Inside the block, PEFT returns a trained prompt once instead of once per example.

    The hooks on the prompt's embedding then expand it, so that each example has its own gradient.
    """
    for module in prompted:
        vars(module)["get_prompt"] = partial(_prompt_of_one, module)
    try:
        yield
    finally:
        for module in prompted:
            del vars(module)["get_prompt"]


def _prompt_of_one(model: PeftModel, batch_size: int, *args: Any, **kwargs: Any) -> Tensor:
    prompt: Tensor = type(model).get_prompt(model, 1, *args, **kwargs)
    return prompt
