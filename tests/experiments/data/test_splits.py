"""Where splits come from: hub, saved data sets, mappings, installed text."""

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

import fish_tuning.experiments.data.splits as splits_module
from fish_tuning.experiments.config.dataset import DatasetConfig
from fish_tuning.experiments.data.load import load_data
from fish_tuning.experiments.errors import ConfigError
from tests.experiments.data.local_data import TEXTS, load, rows, write


@pytest.mark.parametrize("as_dict", [False, True])
def test_saved_dataset(tmp_path, as_dict):
    """Guards data sets written by save_to_disk, class names included."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    columns = {"text": TEXTS, "label": [i % 2 for i in range(12)]}
    saved = Dataset.from_dict(columns, features=features)
    if as_dict:
        saved = DatasetDict({"train": saved, "validation": saved.select([0])})
    saved.save_to_disk(tmp_path / "saved")
    data = load(tmp_path / "saved")
    assert data.label_names == ("no", "yes")
    assert len(data.validation) == 1
    assert len(data.train) == (12 if as_dict else 11)


def test_mapping_of_splits(tmp_path):
    """Guards splits with custom names and file extensions."""
    a = write(tmp_path / "a.txt", "a b,0\nc d,1\n")
    b = write(tmp_path / "b.txt", "e f,1\n")
    config = DatasetConfig(
        path={"mine": a, "theirs": b},
        format="csv",
        columns=["words", "label"],
        train_split="mine",
        validation_split="theirs",
    )
    assert rows(load_data(config).validation) == [("e f", 1)]


def hub(monkeypatch, splits):
    calls = []

    def load_dataset(*args):
        calls.append(args)
        return splits

    monkeypatch.setattr(splits_module.datasets, "load_dataset", load_dataset)
    return calls


def test_hub(monkeypatch):
    """Guards hub data: the call, class names, the original's validation split, extra columns."""
    features = Features(
        {
            "sentence1": Value("string"),
            "sentence2": Value("string"),
            "label": ClassLabel(names=["not_equivalent", "equivalent"]),
            "idx": Value("int32"),
        }
    )
    columns = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0, 1], "idx": [0, 1]}
    split = Dataset.from_dict(columns, features=features)
    unlabelled = Dataset.from_dict({**columns, "label": [-1, -1]}, features=features)
    splits = DatasetDict({"train": split, "validation": split, "test": unlabelled})
    calls = hub(monkeypatch, splits)
    data = load(load_args=["glue", "mrpc"], validation_split="validation")
    assert calls == [("glue", "mrpc")]
    assert data.text_columns == ("sentence1", "sentence2")
    assert data.label_names == ("not_equivalent", "equivalent")
    assert data.train.column_names == ["sentence1", "sentence2", "label"]
    assert data.metrics == ("accuracy", "f1")
    with pytest.raises(ConfigError, match="every label is -1, which public test sets have"):
        load(load_args=["glue", "mrpc"], validation_split="test")


def test_hub_failure(monkeypatch):
    """Guards against a traceback where the hub is out of reach."""

    class UnreachableError(Exception):
        pass

    def load_dataset(*args):
        raise UnreachableError("no route\nto host")

    monkeypatch.setattr(splits_module.datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ConfigError, match=r"dataset\.load_args: \['x'\] .*UnreachableError: no route;"
    ):
        load(load_args=["x"])


def test_installed_text(monkeypatch):
    """Guards the packaged data set's special name."""
    split = Dataset.from_dict({"text": ["a b", "c d"], "label": [0, 1]})
    monkeypatch.setattr(
        "fish_tuning.experiments.data.installed.text.load_installed_text",
        lambda: DatasetDict({"train": split, "validation": split}),
    )
    assert load(name="installed_text").text_columns == ("text",)


def test_splits_that_do_not_exist(tsv):
    """Guards the messages about splits, with the names there are."""
    with pytest.raises(ConfigError, match=r"train_split: there is no split 'tr', only train; name"):
        load(tsv, train_split="tr")
    with pytest.raises(ConfigError, match=r"no split 'validation', only train; .*hold out a share"):
        load(tsv, validation_split="validation")
    with pytest.raises(ConfigError, match=r"validation_fraction: 0\.01 of 12 examples leaves a sp"):
        load(tsv, validation_fraction=0.01)


def test_saved_dataset_that_is_broken(tmp_path):
    """Guards a folder that only looks like a saved data set."""
    write(tmp_path / "state.json", "{}")
    with pytest.raises(ConfigError, match=r"dataset\.path: .* cannot be loaded: "):
        load(tmp_path)


def test_validation_without_the_columns(tmp_path):
    """Guards splits whose columns differ, as GLUE's test files do."""
    write(tmp_path / "train.tsv", "text\tlabel\na b\t0\nc d\t1\n")
    write(tmp_path / "dev.tsv", "index\ttext\n0\ta b\n")
    with pytest.raises(ConfigError, match=r"'dev' has no column 'label', only index, text; use"):
        load(tmp_path)
