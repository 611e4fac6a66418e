"""Tokens and labels are those that TRL's SFTTrainer makes of the same examples."""

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from fish_tuning.experiments.config.model import ModelConfig
from fish_tuning.experiments.data.prompts import prompts_of
from fish_tuning.experiments.data.tokens import IGNORED, LossOn, tokenize_texts
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.models.load import load_model, load_tokenizer
from tests.experiments.tiny_experiment import write_llama
from tests.experiments.tiny_language_model import TEMPLATE, language_model

CHATS = [
    [
        {"role": "system", "content": "w0"},
        {"role": "user", "content": "w1 w2"},
        {"role": "assistant", "content": "w3"},
        {"role": "user", "content": "w4"},
        {"role": "assistant", "content": "w5 w6"},
    ],
    [{"role": "user", "content": "w7"}, {"role": "assistant", "content": "w8"}],
]
TEXTS = {"text": ["w1 w2 w3 <end>", "w4 <end>"]}
PAIRS = {"prompt": ["w1 w2 ", "w3 "], "completion": ["w4 <end>", "w5 w6 <end>"]}
TURNS = {
    "prompt": [CHATS[0][:4], CHATS[1][:1]],
    "completion": [CHATS[0][4:], CHATS[1][1:]],
}


@pytest.fixture(scope="module")
def model_and_tokenizer(tmp_path_factory):
    """A tiny language model and its tokenizer."""
    config = ModelConfig(name=str(language_model(tmp_path_factory.mktemp("model"))))
    tokenizer = load_tokenizer(config)
    return load_model(config, tokenizer, 0), tokenizer


@pytest.mark.parametrize(
    ("columns", "completion_only"),
    [
        (TEXTS, None),
        (PAIRS, None),
        (PAIRS, False),
        (TURNS, None),
        ({"messages": CHATS}, None),
    ],
)
@pytest.mark.parametrize("max_length", [64, 5])
def test_examples_are_those_of_trl(
    model_and_tokenizer, columns, completion_only, max_length, tmp_path
):
    """Guards the start of completions, the end of texts, cutting, and what is left out."""
    model, tokenizer = model_and_tokenizer
    args = SFTConfig(
        output_dir=str(tmp_path),
        max_length=max_length,
        completion_only_loss=completion_only,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    data = Dataset.from_dict(columns)
    trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    expected = trainer.train_dataset.select_columns(["input_ids", "labels"])
    found = tokenize_texts(data, tokenizer, max_length, LossOn(completion_only), "the data")
    assert found[:] == expected[:]


def test_only_the_assistant_is_learned(model_and_tokenizer):
    """Guards the assistant's messages in templates that do not mark them, each with its end."""
    _, tokenizer = model_and_tokenizer
    data = Dataset.from_dict({"messages": CHATS})
    rows = tokenize_texts(data, tokenizer, 64, LossOn(assistant_only=True), "the data")
    learned = [tokenizer.decode([i for i in row if i != IGNORED]) for row in rows["labels"]]
    assert learned == ["w3 <end> w5 w6 <end>", "w8 <end>"]


def test_nothing_left_to_learn_is_told(model_and_tokenizer):
    """Guards against training on prompts that fill the whole length."""
    _, tokenizer = model_and_tokenizer
    data = Dataset.from_dict({"prompt": ["w1 w2 w3 "], "completion": ["w4 <end>"]})
    with pytest.raises(ConfigError, match=r"max_seq_length: 3 tokens leave nothing to learn"):
        tokenize_texts(data, tokenizer, 3, LossOn(), "the data")


def test_a_chat_needs_a_template(model_and_tokenizer):
    """Guards base models, whose tokenizers have no template."""
    _, tokenizer = model_and_tokenizer
    template, tokenizer.chat_template = tokenizer.chat_template, None
    data = Dataset.from_dict({"messages": CHATS})
    with pytest.raises(ConfigError, match=r"model\.name: the tokenizer has no chat template"):
        tokenize_texts(data, tokenizer, 64, LossOn(), "the data")
    tokenizer.chat_template = template


def test_prompts_have_all_their_completions(model_and_tokenizer):
    """Guards references, and the prompt of a chat: everything before its last answer."""
    _, tokenizer = model_and_tokenizer
    columns = {"prompt": ["w1 ", "w2 ", "w1 "], "completion": ["w3 <end>", "w4", "w5"]}
    first, second = prompts_of(Dataset.from_dict(columns), tokenizer)
    assert (first.text, first.references) == ("w1 ", ("w3 ", "w5"))
    assert (second.text, second.references) == ("w2 ", ("w4",))
    assert prompts_of(Dataset.from_dict(columns), tokenizer, 1) == [first]
    chat, _ = prompts_of(Dataset.from_dict({"messages": CHATS}), tokenizer)
    assert chat.references == ("w5 w6",)
    assert chat.text.split()[-2:] == ["<end>", "<assistant>"]


def test_only_the_assistant_is_learned_of_a_completion(model_and_tokenizer):
    """Guards completions of several turns: the user's is not learned."""
    _, tokenizer = model_and_tokenizer
    columns = {"prompt": [CHATS[0][:2]], "completion": [CHATS[0][2:]]}
    for completion_only in (None, False):
        loss = LossOn(completion_only, assistant_only=True)
        [labels] = tokenize_texts(Dataset.from_dict(columns), tokenizer, 64, loss, "x")["labels"]
        learned = tokenizer.decode([i for i in labels if i != IGNORED])
        assert learned == "w3 <end> w5 w6 <end>"
    [prompt] = prompts_of(Dataset.from_dict(columns), tokenizer)
    assert prompt.references == ("w5 w6",)


def test_what_the_template_writes_before_a_chat_is_not_learned(model_and_tokenizer):
    """Guards chats that the assistant begins, in templates with a system prompt of their own."""
    _, tokenizer = model_and_tokenizer
    template, tokenizer.chat_template = tokenizer.chat_template, f"<system> w9 {TEMPLATE}"
    data = Dataset.from_dict({"messages": [CHATS[1][1:] + CHATS[0][3:]]})
    [row] = tokenize_texts(data, tokenizer, 64, LossOn(assistant_only=True), "the data")
    tokenizer.chat_template = template
    assert tokenizer.decode(row["input_ids"]).startswith("<system> w9 <assistant> w8")
    learned = tokenizer.decode([i for i in row["labels"] if i != IGNORED])
    assert learned == "w8 <end> w5 w6 <end>"


def test_ends_that_the_tokenizer_adds(tmp_path):
    """Guards tokenizers that end every text themselves: prompts are not ended, texts not twice."""
    tokenizer = load_tokenizer(ModelConfig(name=str(write_llama(tmp_path))))
    columns = {"prompt": ["w1 w2 "], "completion": ["w3"]}
    [prompt] = prompts_of(Dataset.from_dict(columns), tokenizer)
    assert tokenizer.decode(prompt.input_ids) == "[CLS] w1 w2"
    columns = {"prompt": ["w1 w2 "], "completion": ["w3 [SEP]"]}
    [row] = tokenize_texts(Dataset.from_dict(columns), tokenizer, 64, LossOn(), "x")
    assert tokenizer.decode(row["input_ids"]) == "[CLS] w1 w2 w3 [SEP]"
    assert tokenizer.decode(row["labels"][3:]) == "w3 [SEP]" and row["labels"][:3] == [IGNORED] * 3


def test_prompts_that_the_model_cannot_take(model_and_tokenizer, caplog):
    """Guards positions beyond the model's, and generation from nothing."""
    _, tokenizer = model_and_tokenizer
    prompts = ["", "w1 w2 w3", "w1 w2 w3 w4"]
    data = Dataset.from_dict({"prompt": prompts, "completion": ["w0"] * 3})
    assert [prompt.text for prompt in prompts_of(data, tokenizer, longest=3)] == ["w1 w2 w3"]
    assert "2 of 3 prompts are left out" in caplog.text
    with pytest.raises(ConfigError, match=r"generation: all prompts are empty or longer than 2"):
        prompts_of(data, tokenizer, longest=2)
    starting = [CHATS[0][2:4], CHATS[1]]
    [chat] = prompts_of(Dataset.from_dict({"messages": starting}), tokenizer)
    assert chat.references == ("w8",)
