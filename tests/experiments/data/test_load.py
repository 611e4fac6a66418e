"""Held-out shares, subsets and tokens."""

from collections import Counter

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

from fish_tuning.experiments.config.dataset import DatasetConfig
from fish_tuning.experiments.data.load import load_data, tokenize
from tests.experiments.data.local_data import load, rows, write


def test_held_out_share(tmp_path):
    """Guards the held-out validation split: stratified, disjoint, complete, and always the same."""
    lines = ["text\tlabel", *(f"text {i} here\t{int(i % 5 == 0)}" for i in range(100))]
    path = write(tmp_path / "a.tsv", "\n".join(lines))
    data = load(path, validation_fraction=0.2)
    assert Counter(data.validation["label"]) == {0: 16, 1: 4}
    train, validation = set(data.train["text"]), set(data.validation["text"])
    assert not train & validation
    assert len(train | validation) == 100
    assert rows(load(path, validation_fraction=0.2).validation) == rows(data.validation)
    other = load_data(DatasetConfig(path=path, validation_fraction=0.2), seed=1)
    assert rows(other.validation) != rows(data.validation)
    # Drawn, not the first of each class.
    assert data.validation["text"][:4] != [f"text {i} here" for i in range(4)]


def test_held_out_share_of_many_small_classes(tmp_path):
    """Guards against shares that round to nothing in every class."""
    lines = ["text\tlabel", *(f"text {i} here\tclass {i // 3}" for i in range(60))]
    data = load(write(tmp_path / "a.tsv", "\n".join(lines)), validation_fraction=0.1)
    assert len(data.validation) == 6
    assert max(Counter(data.validation["label"]).values()) == 1


def test_subsets(tmp_path):
    """Guards subsets: their size, drawn from everywhere, one not moving the other."""
    lines = ["text\tlabel", *(f"text {i} here\t{i % 2}" for i in range(200))]
    write(tmp_path / "train.tsv", "\n".join(lines))
    write(tmp_path / "dev.tsv", "\n".join(lines))
    small = load(tmp_path, max_train_samples=50, max_validation_samples=20)
    assert (len(small.train), len(small.validation)) == (50, 20)
    assert small.train["text"][:] != [f"text {i} here" for i in range(50)]
    assert len(set(small.train["text"])) == 50
    larger = load(tmp_path, max_train_samples=500, max_validation_samples=20)
    assert len(larger.train) == 200
    assert rows(larger.validation) == rows(small.validation)


@pytest.fixture
def tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_input_names=names
    )


def test_tokenize(tmp_path, tokenizer):
    """Guards the inputs: only what a model takes, truncated, not padded, labels as ids."""
    write(tmp_path / "train.tsv", "text\tlabel\na\tno\nb c d e a b\tyes\n")
    write(tmp_path / "dev.tsv", "text\tlabel\nc\tyes\n")
    train, validation = tokenize(load(tmp_path), tokenizer, max_seq_length=5)
    assert set(train.column_names) == {*tokenizer.model_input_names, "labels"}
    assert train["input_ids"][:] == [[2, 4, 3], [2, 5, 6, 7, 3]]
    assert train["labels"][:] == [0, 1]
    assert validation[0]["input_ids"] == [2, 6, 3]


def test_tokenize_pairs_and_collate(tmp_path, tokenizer):
    """Guards pairs, the types they are told apart by, and float labels in the batch."""
    write(tmp_path / "train.tsv", "sentence1\tsentence2\tlabel\na b\tc\t0.5\nd\te\t2\n")
    write(tmp_path / "dev.tsv", "sentence1\tsentence2\tlabel\na\tb\t1\n")
    train, _ = tokenize(load(tmp_path), tokenizer, max_seq_length=16)
    assert train["input_ids"][:] == [[2, 4, 5, 3, 6, 3], [2, 7, 3, 8, 3]]
    assert train["token_type_ids"][0] == [0, 0, 0, 0, 1, 1]
    batch = DataCollatorWithPadding(tokenizer)([train[0], train[1]])
    assert batch["input_ids"].shape == (2, 6)
    assert batch["labels"].tolist() == [0.5, 2.0]
    assert batch["labels"].is_floating_point()
