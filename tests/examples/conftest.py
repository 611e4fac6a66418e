"""Small models and data in folders, for the `--model` and `--dataset` of the examples."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.models import tiny_bert, tiny_llama, tiny_vit
from tests.training import tiny_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"

SENTENCES = ["the fish swims up", "the river", "down the river again", "fish and river again"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'and ' }}{% endif %}"
)


@pytest.fixture
def run_example(monkeypatch, tmp_path):
    """Runs an example in this process, with command-line arguments, in a folder of its own."""

    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


def saved(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def written(folder, **splits):
    """A data set that `load_dataset` reads from a folder."""
    for split, rows in splits.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def message(role, content):
    return {"role": role, "content": content}


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("classifier"), tiny_bert().bert, tiny_tokenizer())


@pytest.fixture(scope="session")
def language_model(tmp_path_factory):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return saved(
        tmp_path_factory.mktemp("language_model"),
        tiny_llama(hidden_size=64, intermediate_size=128),
        tokenizer,
    )


@pytest.fixture(scope="session")
def sentences(tmp_path_factory):
    rows = [{"sentence": text, "label": i % 2} for i, text in enumerate(SENTENCES * 3)]
    return written(tmp_path_factory.mktemp("sentences"), train=rows, validation=rows[:4])


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    rows = [
        {"messages": [message("user", text), message("assistant", "the fish swims again")]}
        for text in SENTENCES * 3
    ]
    return written(tmp_path_factory.mktemp("chats"), train=rows)


@pytest.fixture(scope="session")
def preferences(tmp_path_factory):
    def answered(text, answer):
        return [message("user", text), message("assistant", answer)]

    rows = [
        {"chosen": answered(text, "the fish"), "rejected": answered(text, "the river again")}
        for text in SENTENCES * 3
    ]
    return written(tmp_path_factory.mktemp("preferences"), train=rows)


@pytest.fixture(scope="session")
def vision_model(tmp_path_factory):
    from transformers import ViTImageProcessor

    folder = saved(tmp_path_factory.mktemp("vision_model"), tiny_vit().vit)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    for label, color in {"cat": "red", "dog": "blue"}.items():
        (folder / "train" / label).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (10 + number, 9), color).save(
                folder / "train" / label / f"{number}.png"
            )
    return folder
