"""The forms of text that language models learn from, brought to TRL's standard columns."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any, Literal

from datasets import Dataset

from fish_tuning.experiments.config.text_form import TextForm, template_columns
from fish_tuning.experiments.data.chat import chat_of, check_chat
from fish_tuning.experiments.data.columns import column
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.metrics.names import CAUSAL_LM

Kind = Literal["text", "prompt and completion", "chat"]

PAIRS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("prompt", "response"),
    ("input", "output"),
)
"""Columns that are a prompt and a completion by their names."""

COMPLETIONS = tuple(dict.fromkeys(completion for _, completion in PAIRS))
"""Columns that hold completions by their names."""

_AS_THEY_ARE = ("prompt", "completion")
_CHATS = ("messages", "conversations", "conversation")
_LABELS = ("label", "labels", "class", "gold_label")
_PREFERENCES = {"chosen", "rejected"}


def kind_of(data: Dataset) -> Kind:
    """Return the form of a data set that `standard_form` made."""
    if "messages" in data.column_names:
        return "chat"
    return "prompt and completion" if "prompt" in data.column_names else "text"


def likely_form(names: Sequence[str]) -> str | None:
    """Return the columns by which data is recognized as texts for a language model, if any."""
    chats = [name for name in _CHATS if name in names]
    pairs = [" and ".join(pair) for pair in PAIRS if set(pair) <= set(names)]
    return next(iter([*chats, *pairs]), None)


def refuse_texts_to_generate(names: Sequence[str]) -> None:
    """Tell that data without labels is for a language model, if its columns look like it.

    Raises:
        ConfigError: They do.
    """
    found = likely_form(names) or ("text" if list(names) == ["text"] else None)
    if found is not None:
        raise ConfigError(
            f"dataset.task: the data has {found} and no label, so it looks like texts that a "
            f"language model learns to write; set dataset.task: {CAUSAL_LM}, or name another "
            "dataset.label_column to classify"
        )


def refuse_examples_to_classify(names: Sequence[str], form: TextForm) -> None:
    """Tell that data with labels is for a classifier, unless the config says what to write.

    Raises:
        ConfigError: It looks like it.
    """
    labels = [name for name in names if name.lower() in _LABELS]
    if labels and likely_form(names) is None and form.text_column is None and not form.own_keys:
        raise ConfigError(
            f"dataset.task: the data has the columns {', '.join(names)}, so it looks like "
            f"classification; remove dataset.task: {CAUSAL_LM}, or set dataset.text_column to "
            "what the model learns to write"
        )


def standard_form(data: Dataset, split: str, form: TextForm) -> Dataset:
    """Bring the rows of a split to one of TRL's forms.

    Args:
        data: The rows as they were read.
        split: Their split, for messages.
        form: Which columns to use; by default they are found by name.

    Returns:
        A data set with the column `text`, the columns `prompt` and `completion` (texts or, after
        `apply_chat_template`, lists of messages), or the column `messages`.

    Raises:
        ConfigError: The columns are not there, or a row does not have the form.
    """
    where = f"dataset: the split {split!r}"
    if form.prompt_template is not None and form.completion_template is not None:
        prompts = _filled(data, form.prompt_template, "prompt_template", where)
        completions = _filled(data, form.completion_template, "completion_template", where)
        return _pairs(prompts, completions, form, where)
    names = _columns(data, form, where)
    if len(names) == 2:
        prompts = _prompts(data, names[0], names[1], where)
        completions = _texts_or_chats(data, names[1], where)
        if tuple(names) != _AS_THEY_ARE and not form.apply_chat_template:
            prompts = [_with_line_break(prompt) for prompt in prompts]
        return _pairs(prompts, completions, form, where)
    values = column(data, names[0])
    if names[0] == form.messages_column or (form.text_column is None and names[0] in _CHATS):
        return _of_rows("messages", values, chat_of, check_chat, where)
    if form.apply_chat_template:
        raise ConfigError(
            "dataset.apply_chat_template: is for prompts and completions, and the data is plain "
            f"text in the column {names[0]!r}; remove it, or name the columns"
        )
    _check_rows(values, f"{where}, column {names[0]!r}", empty_allowed=True)
    # Corpora of lines have empty ones between their paragraphs.
    return Dataset.from_dict({"text": [str(text) for text in values if str(text).strip()]})


def _columns(data: Dataset, form: TextForm, where: str) -> list[str]:
    """The columns to use: one with texts or chats, or two with prompts and completions."""
    have = data.column_names
    given = {
        key: name
        for key, name in (
            ("text_column", form.text_column[0] if form.text_column else None),
            ("prompt_column", form.prompt_column),
            ("completion_column", form.completion_column),
            ("messages_column", form.messages_column),
        )
        if name is not None
    }
    for key, name in given.items():
        if name not in have:
            raise ConfigError(f"dataset.{key}: {_missing(name, have)}")
    if given:
        return list(given.values())
    chats = [name for name in _CHATS if name in have]
    pairs = [pair for pair in PAIRS if set(pair) <= set(have)]
    # A column of its own that is only part of a chat, such as the first prompt, is no second form.
    if chats and any(pair == _AS_THEY_ARE for pair in pairs):
        raise ConfigError(
            f"{where} has both {chats[0]} and prompt and completion; name one form: "
            "dataset.messages_column, or prompt_column and completion_column"
        )
    if chats:
        return chats[:1]
    if pairs:
        return list(pairs[0])
    if "text" in have:
        return ["text"]
    if set(have) >= _PREFERENCES:
        raise ConfigError(
            f"{where} has chosen and rejected answers, which are for preference tuning; set "
            "prompt_column and completion_column to train on one of them"
        )
    strings = [name for name in have if getattr(data.features[name], "dtype", None) == "string"]
    if len(have) == len(strings) == 1:
        return strings
    raise ConfigError(
        f"{where} has the columns {', '.join(have)}, none of which have the names of texts, "
        "prompts and completions, or chats; set dataset.text_column, prompt_column and "
        "completion_column, prompt_template and completion_template, or messages_column"
    )


def _missing(name: str, have: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, have, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "name one of them"
    return f"there is no column {name!r}, only {', '.join(have)}; {hint}"


def _filled(data: Dataset, template: str, key: str, where: str) -> list[str]:
    """Put the values of a row into a template, for every row."""
    names = dict.fromkeys(template_columns(template))
    for name in names:
        if name not in data.column_names:
            raise ConfigError(f"dataset.{key}: {_missing(name, data.column_names)}")
    values = {name: [_stripped(value) for value in column(data, name)] for name in names}
    for name, texts in values.items():
        _check_rows(texts, f"{where}, column {name!r}", empty_allowed=True)
    return [
        template.format_map({name: texts[row] for name, texts in values.items()})
        for row in range(len(data))
    ]


def _stripped(value: Any) -> Any:
    return str(value).strip() if isinstance(value, str | int | float) else value


def _prompts(data: Dataset, prompt: str, completion: str, where: str) -> list[Any]:
    """The prompts; those of instructions have the input below, where there is one."""
    prompts = _texts_or_chats(data, prompt, where)
    if prompt == "instruction" and completion != "input" and "input" in data.column_names:
        inputs = [str(value or "").strip() for value in column(data, "input")]
        prompts = [
            f"{text.rstrip()}\n\n{more}" if more else text
            for text, more in zip(prompts, inputs, strict=True)
        ]
    return prompts


def _with_line_break(prompt: Any) -> Any:
    return f"{prompt.rstrip()}\n" if isinstance(prompt, str) else prompt


def _texts_or_chats(data: Dataset, name: str, where: str) -> list[Any]:
    values = column(data, name)
    if values and isinstance(values[0], list):
        rows: list[Any] = _of_rows(name, values, chat_of, None, where)[name][:]
        return rows
    return _texts(values, name, where)


def _texts(values: Sequence[Any], name: str, where: str) -> list[str]:
    _check_rows(values, f"{where}, column {name!r}")
    return [str(value) for value in values]


def _check_rows(values: Sequence[Any], where: str, *, empty_allowed: bool = False) -> None:
    for row, value in enumerate(values, start=1):
        wrong = not isinstance(value, str | int | float) or isinstance(value, bool)
        if wrong or (not empty_allowed and not str(value).strip()):
            shown = repr(value)
            raise ConfigError(
                f"{where}, row {row}: {shown[:80]}{'...' * (len(shown) > 80)} is not text; fill it "
                "in, remove the row or name another column"
            )


def _of_rows(
    name: str,
    values: Sequence[Any],
    convert: Callable[[Any], Any],
    check: Callable[[Any], None] | None,
    where: str,
) -> Dataset:
    rows = []
    for number, value in enumerate(values, start=1):
        try:
            rows.append(convert(value))
            if check is not None:
                check(rows[-1])
        except ValueError as error:
            raise ConfigError(f"{where}, column {name!r}, row {number}: {error}") from None
    return Dataset.from_dict({name: rows})


def _pairs(prompts: list[Any], completions: list[Any], form: TextForm, where: str) -> Dataset:
    for row, completion in enumerate(completions, start=1):
        if not completion or (isinstance(completion, str) and not completion.strip()):
            raise ConfigError(
                f"{where}, row {row}: the completion is empty, so there is nothing to learn; fill "
                "it in or remove the row"
            )
    if {type(value) for value in prompts} != {type(value) for value in completions}:
        raise ConfigError(f"{where}: prompts and completions must both be texts, or both be chats")
    if form.apply_chat_template and isinstance(prompts[0], str):
        prompts = [[{"role": "user", "content": text.strip()}] for text in prompts]
        completions = [[{"role": "assistant", "content": text.strip()}] for text in completions]
    return Dataset.from_dict({"prompt": prompts, "completion": completions})
