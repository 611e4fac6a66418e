"""From texts to the tokens that a language model reads, and those that its loss is computed on."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from fish_tuning.experiments.data.columns import column
from fish_tuning.experiments.data.text_forms import kind_of
from fish_tuning.experiments.errors import ConfigError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Chat = list[dict[str, str]]
IGNORED = -100


@dataclass(frozen=True)
class LossOn:
    """Which tokens the loss is computed on, as trl.SFTConfig names it.

    Attributes:
        completion_only: Completions alone, or prompts too; None decides by the data, like TRL.
        assistant_only: The assistant's messages alone.
    """

    completion_only: bool | None = None
    assistant_only: bool = False


def tokenize_texts(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, loss: LossOn, where: str
) -> Dataset:
    """Tokenize examples as TRL's SFTTrainer does, once for all runs.

    Texts and completions end with the tokenizer's end of sequence. A completion starts where the
    tokens of prompt and completion differ from those of the prompt alone. Examples are cut to the
    maximum length; those that are left without a token to learn are dropped.

    Args:
        data: Examples in the columns that `standard_form` makes.
        tokenizer: The model's tokenizer.
        max_length: The length of the longest input, in tokens.
        loss: Which tokens the loss is computed on.
        where: The data's place in the config, for messages.

    Returns:
        A data set with `input_ids` and `labels`; -100 marks tokens without a loss.

    Raises:
        ConfigError: The tokenizer has no chat template, or no example is left.
    """
    encode = {"text": _texts, "prompt and completion": _pairs, "chat": _chats}[kind_of(data)]
    rows = encode(data, tokenizer, loss)
    longer = sum(len(ids) > max_length for ids, _ in rows)
    rows = [(ids[:max_length], labels[:max_length]) for ids, labels in rows]
    # The first token has no prediction.
    kept = [row for row in rows if any(label != IGNORED for label in row[1][1:])]
    if longer:
        logger.warning(
            "%s: %d of %d examples are longer than %d tokens and are cut there; %d of them have "
            "nothing left to learn and are left out (training.max_seq_length)",
            *(where, longer, len(rows), max_length, len(rows) - len(kept)),
        )
    if not kept:
        raise ConfigError(
            f"training.max_seq_length: {max_length} tokens leave nothing to learn in any example "
            f"of {where}; raise it"
        )
    ids, labels = zip(*kept, strict=True)
    return Dataset.from_dict({"input_ids": list(ids), "labels": list(labels)})


Rows = list[tuple[list[int], list[int]]]


def _texts(data: Dataset, tokenizer: PreTrainedTokenizerBase, loss: LossOn) -> Rows:
    rows = encoded(tokenizer, [_ended(text, tokenizer) for text in column(data, "text")])
    return [(ids, list(ids)) for ids in rows]


def _pairs(data: Dataset, tokenizer: PreTrainedTokenizerBase, loss: LossOn) -> Rows:
    prompts, completions = column(data, "prompt"), column(data, "completion")
    chats = isinstance(prompts[0], list)
    if chats:
        starts = [rendered(tokenizer, prompt, prompting=True) for prompt in prompts]
        wholes = [
            rendered(tokenizer, prompt + completion)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
    else:
        starts = encoded(tokenizer, prompts)
        wholes = encoded(
            tokenizer,
            [
                prompt + _ended(completion, tokenizer)
                for prompt, completion in zip(prompts, completions, strict=True)
            ],
        )
    rows = []
    for row, (start, whole) in enumerate(zip(starts, wholes, strict=True)):
        given = 0 if loss.completion_only is False else _common_prefix(start, whole)
        learned = whole
        if chats and loss.assistant_only:
            learned = _assistant_labels(tokenizer, prompts[row] + completions[row], whole)
        rows.append((whole, [IGNORED] * given + learned[given:]))
    return rows


def _chats(data: Dataset, tokenizer: PreTrainedTokenizerBase, loss: LossOn) -> Rows:
    rows = []
    for messages in column(data, "messages"):
        whole = rendered(tokenizer, messages)
        labels = _assistant_labels(tokenizer, messages, whole) if loss.assistant_only else whole
        rows.append((whole, list(labels)))
    return rows


def _assistant_labels(
    tokenizer: PreTrainedTokenizerBase, messages: Chat, whole: list[int]
) -> list[int]:
    """Keep the tokens of the assistant's messages, each up to its end of turn.

    Most templates do not mark them. They are found by rendering the chat up to each message.
    """
    labels = [IGNORED] * len(whole)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = rendered(tokenizer, messages[:number], prompting=True)
        start = _common_prefix(before, whole)
        if number == 0:
            # There is nothing before it but what the template writes itself, a system prompt say.
            other = "1" if message["content"].startswith("0") else "0"
            replaced = rendered(tokenizer, [{**message, "content": other}, *messages[1:]])
            start = _common_prefix(replaced, whole)
        end = _common_prefix(rendered(tokenizer, messages[: number + 1]), whole)
        if start < len(before) or end <= start:
            raise ConfigError(
                "training.args_override.assistant_only_loss: the model's chat template writes "
                "earlier messages differently once others follow, so that the assistant's cannot "
                "be found; use prompts and completions, or set it to false"
            )
        turn = whole[start:end]
        if tokenizer.eos_token_id in turn:
            # Templates often write a line break after the end of a turn.
            end -= turn[::-1].index(tokenizer.eos_token_id)
        labels[start:end] = whole[start:end]
    return labels


def rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Chat, *, prompting: bool = False
) -> list[int]:
    """Return the tokens of a chat, in the model's template.

    Args:
        tokenizer: The model's tokenizer.
        messages: The chat.
        prompting: Whether to end with the start of a message of the assistant.

    Raises:
        ConfigError: The tokenizer has no template, or it refuses the chat.
    """
    if not messages:
        return []
    if tokenizer.chat_template is None:
        raise ConfigError(
            "model.name: the tokenizer has no chat template, and the data is chat; use a model "
            "that was tuned to chat, or prompts and completions"
        )
    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=prompting, return_dict=True
        )
    # Templates raise jinja2's errors with the template's own messages.
    except Exception as error:
        raise ConfigError(
            f"dataset: the model's chat template refuses a chat: {first_line(error)}"
        ) from error
    ids: list[int] = encoded["input_ids"]
    return ids


def encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the tokens of texts, without an end of sequence that only the tokenizer has added.

    A prompt must not end with one, nor a completion with two.
    """
    rows: list[list[int]] = tokenizer(texts)["input_ids"]
    end, added = tokenizer.eos_token_id, tokenizer("")["input_ids"]
    if end is not None and added[-1:] == [end]:
        rows = [ids[:-1] if ids[-1:] == [end] else ids for ids in rows]
    return rows


def _ended(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    end = str(tokenizer.eos_token or "")
    return text if text.endswith(end) else text + end


def _common_prefix(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    shorter = min(len(first), len(second))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), shorter)
