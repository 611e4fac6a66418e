"""The prompts that texts are generated from, each with the completions it has in the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from datasets import Dataset

from fish_tuning.experiments.data.columns import column
from fish_tuning.experiments.data.text_forms import kind_of
from fish_tuning.experiments.data.tokens import Chat, rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """What a text is generated from.

    Attributes:
        text: The prompt as text; of a chat, in the model's template.
        input_ids: Its tokens.
        references: The completions that the data has for it.
    """

    text: str
    input_ids: tuple[int, ...]
    references: tuple[str, ...]


def prompts_of(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> list[Prompt]:
    """List the different prompts of a data set, in the order of their first rows.

    Of a chat, the prompt is everything before its last message of the assistant.

    Args:
        data: Prompts and completions, or chats, in the columns that `standard_form` makes.
        tokenizer: The model's tokenizer.
        limit: How many prompts to return at most.
    """
    found: dict[str, tuple[list[int], list[str]]] = {}
    for given, completion in _rows(data):
        if isinstance(given, str):
            ids, text = tokenizer(given)["input_ids"], given
        else:
            ids = rendered(tokenizer, given, prompting=True)
            text = str(tokenizer.decode(ids))
        # Data may write out the end of sequence, which is not part of a generated text.
        completion = completion.removesuffix(str(tokenizer.eos_token))
        found.setdefault(text, (ids, []))[1].append(completion)
    prompts = [
        Prompt(text, tuple(ids), tuple(dict.fromkeys(references)))
        for text, (ids, references) in found.items()
    ]
    return prompts[:limit]


def _rows(data: Dataset) -> list[tuple[str | Chat, str]]:
    """Pairs of what is given and what is to be generated."""
    if kind_of(data) == "chat":
        return [_divided(messages) for messages in column(data, "messages")]
    return [
        (given, completion if isinstance(completion, str) else completion[0]["content"])
        for given, completion in zip(
            column(data, "prompt"), column(data, "completion"), strict=True
        )
    ]


def _divided(messages: Chat) -> tuple[Chat, str]:
    last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:last], messages[last]["content"]
