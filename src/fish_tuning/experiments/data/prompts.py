"""The prompts that texts are generated from, each with the completions it has in the data."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datasets import Dataset

from fish_tuning.experiments.data.chat import prompt_and_answer
from fish_tuning.experiments.data.columns import column
from fish_tuning.experiments.data.text_forms import kind_of
from fish_tuning.experiments.data.tokens import Chat, encoded, rendered
from fish_tuning.experiments.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


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
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
    longest: int | None = None,
) -> list[Prompt]:
    """List the different prompts of a data set, in the order of their first rows.

    Of a chat, the prompt is everything before its last message of the assistant. Prompts without
    a token, or with too many, are left out.

    Args:
        data: Prompts and completions, or chats, in the columns that `standard_form` makes.
        tokenizer: The model's tokenizer.
        limit: How many prompts to return at most.
        longest: How many tokens a prompt may have, so that the model takes it and the text.

    Raises:
        ConfigError: No prompt is left.
    """
    found: dict[str, tuple[list[int], list[str]]] = {}
    for given, completion in prompts_and_completions(data):
        if isinstance(given, str):
            ids, text = encoded(tokenizer, [given])[0], given
        else:
            ids = rendered(tokenizer, given, prompting=True)
            text = str(tokenizer.decode(ids))
        # Data may write out the end of sequence, which is not part of a generated text.
        completion = completion.removesuffix(str(tokenizer.eos_token))
        found.setdefault(text, (ids, []))[1].append(completion)
    prompts = [
        Prompt(text, tuple(ids), tuple(dict.fromkeys(references)))
        for text, (ids, references) in found.items()
        if ids and (longest is None or len(ids) <= longest)
    ]
    if not prompts:
        raise ConfigError(
            f"generation: all prompts are empty or longer than {longest} tokens, which is what the "
            "model takes beside generation.max_new_tokens; lower that, or give other prompts"
        )
    if len(prompts) < len(found):
        logger.warning(
            "generation: %d of %d prompts are left out, because they are empty or longer than "
            "the %s tokens that the model takes beside generation.max_new_tokens",
            *(len(found) - len(prompts), len(found), longest),
        )
    return prompts[:limit]


def prompts_and_completions(data: Dataset) -> list[tuple[str | Chat, str]]:
    """Pairs of what is given and what is to be generated, one per row."""
    if kind_of(data) == "chat":
        return [prompt_and_answer(messages) for messages in column(data, "messages")]
    pairs = []
    for given, completion in zip(column(data, "prompt"), column(data, "completion"), strict=True):
        if isinstance(completion, str):
            pairs.append((given, completion))
        else:
            pairs.append(prompt_and_answer([*given, *completion]))
    return pairs
