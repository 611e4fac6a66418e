"""Every form of text that people have becomes one of TRL's; every other is told in a sentence."""

import json

import pytest

from fish_tuning.experiments.config.dataset import DatasetConfig
from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.data.generative import load_generative_data
from fish_tuning.experiments.data.load import load_data
from fish_tuning.experiments.data.splits import load_split, open_splits
from fish_tuning.experiments.data.text_forms import standard_form
from fish_tuning.experiments.errors import ConfigError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]


def read(tmp_path, rows, suffix="jsonl", **keys):
    """The first row of a file in its standard form."""
    path = tmp_path / f"train.{suffix}"
    if isinstance(rows, str):
        path.write_text(rows, encoding="utf-8")
    else:
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = DatasetConfig(path=str(path), task="causal_lm", **keys)
    data = load_split(open_splits(config), "train", "train_split")
    return standard_form(data, "train", config)[0]


@pytest.mark.parametrize(
    ("row", "keys", "expected"),
    [
        ({"text": "a b"}, {}, {"text": "a b"}),
        ({"body": "a b"}, {}, {"text": "a b"}),
        ({"prompt": "a ", "completion": "b"}, {}, {"prompt": "a ", "completion": "b"}),
        ({"question": "a", "answer": "b"}, {}, {"prompt": "a\n", "completion": "b"}),
        (
            {"instruction": "a", "input": "b", "output": "c"},
            {},
            {"prompt": "a\n\nb\n", "completion": "c"},
        ),
        (
            {"instruction": "a", "input": "", "output": "c"},
            {},
            {"prompt": "a\n", "completion": "c"},
        ),
        (
            {"x": "a", "y": "b", "text": "c"},
            {"prompt_column": "x", "completion_column": "y"},
            {"prompt": "a\n", "completion": "b"},
        ),
        (
            {"x": " a ", "y": 5},
            {"prompt_template": "{{Q}} {x}:", "completion_template": " {y}"},
            {"prompt": "{Q} a:", "completion": " 5"},
        ),
        ({"messages": CHAT}, {}, {"messages": CHAT}),
        ({"conversations": SHAREGPT}, {}, {"messages": CHAT}),
        ({"talk": SHAREGPT, "text": "a"}, {"messages_column": "talk"}, {"messages": CHAT}),
        ({"messages": CHAT, "prompt": "hi"}, {}, {"messages": CHAT}),
        ({"messages": json.dumps(CHAT)}, {}, {"messages": CHAT}),
        (
            {"question": "hi ", "answer": "hello"},
            {"apply_chat_template": True},
            {"prompt": CHAT[:1], "completion": CHAT[1:]},
        ),
        (
            {"prompt": CHAT[:1], "completion": CHAT[1:]},
            {},
            {"prompt": CHAT[:1], "completion": CHAT[1:]},
        ),
    ],
)
def test_forms(tmp_path, row, keys, expected):
    """Guards the forms that public data comes in."""
    assert read(tmp_path, [row, row], **keys) == expected


@pytest.mark.parametrize(
    ("content", "suffix", "keys", "expected"),
    [
        ("a b\n\nc d\n", "txt", {}, {"text": "a b"}),
        (
            "a | b||c d . \n",
            "txt",
            {
                "delimiter": "||",
                "columns": ["from", "to"],
                "prompt_template": "{from}\n",
                "completion_template": "{to}",
            },
            {"prompt": "a | b\n", "completion": "c d ."},
        ),
        ('prompt,completion\n"a, b ",c\n', "csv", {}, {"prompt": "a, b ", "completion": "c"}),
    ],
)
def test_files(tmp_path, content, suffix, keys, expected):
    """Guards text files, with and without a delimiter."""
    assert read(tmp_path, content, suffix, **keys) == expected


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        ([{"a": "x", "b": "y"}], {}, r"has the columns a, b, none of which .*; set dataset\.text"),
        ([{"prompt": "x", "completion": ""}], {}, r"row 1: '' is not text"),
        ([{"prompt": "x", "completion": None}], {}, r"row 1: None is not text"),
        ([{"text": "x"}, {"text": ["y"]}], {"text_column": "txt"}, r"did you mean 'text'\?"),
        ([{"messages": "hi"}], {}, r"row 1: 'hi' is not a list of messages with role and content"),
        ([{"messages": [{"role": "boss", "content": "x"}]}], {}, r"message 1 has the role 'boss'"),
        ([{"messages": CHAT[:1]}], {}, r"no message is the assistant's"),
        (
            [{"messages": CHAT}, {"messages": [CHAT[0], {"role": "assistant", "content": ["x"]}]}],
            {},
            r"row 2: message 2 has the content \['x'\], which is not text",
        ),
        (
            [{"messages": [*CHAT, {"role": "assistant", "content": "", "tool_calls": [{"a": 1}]}]}],
            {},
            r"row 1: message 3 calls tools, .* write the calls into its content",
        ),
        ([{"chosen": "x", "rejected": "y"}], {}, r"are for preference tuning"),
        (
            [{"messages": CHAT, "prompt": "x", "completion": "y"}],
            {},
            r"has both messages and prompt and completion; name one form",
        ),
        (
            [{"q": "x", "a": "y"}],
            {"prompt_template": "{question}", "completion_template": "{a}"},
            r"dataset\.prompt_template: there is no column 'question', only q, a",
        ),
        (
            [{"text": "x"}],
            {"apply_chat_template": True},
            r"apply_chat_template: is for prompts and completions, and the data is plain text",
        ),
        (
            [{"prompt": "x", "completion": CHAT[1:]}],
            {},
            r"prompts and completions must both be texts, or both be chats",
        ),
    ],
)
def test_wrong_forms_are_told(tmp_path, rows, keys, message):
    """Guards against training on something else than what is meant."""
    with pytest.raises(ConfigError, match=message) as raised:
        read(tmp_path, rows, **keys)
    assert len(raised.value.problems) == 1


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"prompt": "a b", "completion": "c d"}, {}),
        ({"messages": CHAT}, {}),
        ({"conversations": SHAREGPT}, {}),
        ({"instruction": "a b", "input": "", "output": "c d"}, {}),
        ({"question": "a b", "answer": "c d"}, {"label_column": "answer"}),
        ({"text": "a b"}, {}),
    ],
)
def test_a_classifier_is_told_what_it_was_given(tmp_path, row, keys):
    """Guards against advice that turns texts into two classes."""
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([json.dumps(row)] * 12), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"dataset\.task: .* set dataset\.task: causal_lm"):
        load_data(DatasetConfig(path=str(path), **keys))


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a b", "label": 1},
        {"sentence": "a b", "Label": "x"},
        {"premise": "a b", "hypothesis": "c", "gold_label": 0},
    ],
)
def test_a_language_model_is_told_what_it_was_given(tmp_path, row):
    """Guards against a language model trained on the texts of a classification task."""
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([json.dumps(row)] * 12), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"dataset\.task: .* remove dataset\.task: causal_lm, or"):
        load_generative_data(language_model_config(path))
    column = next(iter(row))
    data = load_generative_data(language_model_config(path, text_column=[column]))
    assert data.train[0] == {"text": row[column]}


def language_model_config(path, **keys):
    dataset = {"path": str(path), "task": "causal_lm", **keys}
    return ExperimentConfig.model_validate({"model": {"name": "m"}, "dataset": dataset})
