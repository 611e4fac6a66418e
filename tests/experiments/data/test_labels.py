"""Labels: what is predicted, and which columns hold no labels."""

import json

import pytest

from fish_tuning.experiments.errors import ConfigError
from tests.experiments.data.local_data import load, write


def labelled(tmp_path, labels, dev=None, **options):
    for split, values in (("train", labels), ("dev", dev if dev is not None else labels)):
        records = [{"text": f"some text {i}", "label": label} for i, label in enumerate(values)]
        write(tmp_path / f"{split}.json", json.dumps(records))
    return load(tmp_path, **options)


@pytest.mark.parametrize(
    ("labels", "options", "names", "ids"),
    [
        ([1, -1, 1], {}, ("-1", "1"), [1, 0, 1]),
        ([1, -1, 1], {"num_labels": 2}, ("-1", "1"), [1, 0, 1]),
        ([5, 2, 9], {}, ("2", "5", "9"), [1, 0, 2]),
        ([1.0, 0.0], {}, ("0", "1"), [1, 0]),
        (["10", "9", "10"], {}, ("9", "10"), [1, 0, 1]),
        ([True, False], {}, ("false", "true"), [1, 0]),
        (["b ", "a"], {}, ("a", "b"), [1, 0]),
        (["nan", "inf"], {}, ("inf", "nan"), [1, 0]),
        (["no", "yes"], {"label_names": ["yes", "no"]}, ("yes", "no"), [1, 0]),
        ([0, 1], {"label_names": ["bad", "good"]}, ("bad", "good"), [0, 1]),
        ([1, 2], {"label_names": ["bad", "good"]}, ("bad", "good"), [0, 1]),
        ([1, 0], {"label_names": [1, 0]}, ("1", "0"), [0, 1]),
        ([0, 2], {"num_labels": 3}, ("0", "1", "2"), [0, 2]),
        ([0, 2], {"label_names": ["a", "b", "c"]}, ("a", "b", "c"), [0, 2]),
    ],
)
def test_classes(tmp_path, labels, options, names, ids):
    """Guards the ids: sorted, numbers as numbers, named and absent classes in their place."""
    data = labelled(tmp_path, labels, **options)
    assert data.label_names == names
    assert data.train["label"][:] == ids
    assert data.num_labels == len(names)


@pytest.mark.parametrize(
    ("labels", "options"),
    [([0.5, 2, 4.75], {}), (["0.5", "2", "4.75"], {}), ([1, 2, 3], {"task": "regression"})],
)
def test_regression(tmp_path, labels, options):
    """Guards regression: told by a fractional part, or said; labels stay what they are."""
    data = labelled(tmp_path, labels, **options)
    assert (data.task, data.num_labels, data.label_names) == ("regression", 1, ())
    assert data.train["label"][:] == [float(label) for label in labels]
    assert data.metrics == ("pearson", "spearmanr", "mse")


BAD_LABELS = [
    ([1, 1, 1], None, {}, r"all 3 training examples have one label"),
    ([1, None], None, {}, r"'train', row 2: the label is None; fill it in"),
    (["a", " "], None, {}, r"'train', row 2: the label is ' '"),
    ([0, 1], [0, 7], {}, r"'dev', row 2: 7 is not among the labels .*\('0', '1'\)"),
    (["a", "b"], ["a", "c"], {}, r"'dev', row 2: 'c' is not among the labels .*'a', 'b'"),
    ([0, 1], ["0", "x"], {}, r"'dev', row 2: 'x' is not a number"),
    ([0.5, 1], ["0.5", "x"], {}, r"'dev', row 2: 'x' is not a number"),
    ([0, 1], [-1, -1], {}, r"'dev': every label is -1"),
    ([[0], [1]], None, {}, r"the label \[0\] is a list; one label per example"),
    (["a", "b"], None, {"task": "regression"}, r"'a', 'b' are not numbers"),
    ([0.5, 1], None, {"task": "classification"}, r"fractional part cannot be classes"),
    ([0.5, 1], None, {"num_labels": 2}, r"dataset\.num_labels: .*have a fractional part"),
    (["a", "b"], None, {"num_labels": 3}, r"num_labels: is 3, but .* has 2 classes \('a', 'b'\)"),
    (["a", "b"], None, {"label_names": ["a", "x"]}, r"row 2: 'b' is not among .*'a', 'x'"),
    (list(range(30)), None, {}, r"30 distinct values in 30 rows cannot be classes; .*regression"),
    ([0, 1], None, {"metric": "mse"}, r"dataset\.metric: 'mse' does not measure classification"),
]


@pytest.mark.parametrize(("labels", "dev", "options", "message"), BAD_LABELS)
def test_bad_labels(tmp_path, labels, dev, options, message):
    """Guards against training on labels that are no labels."""
    with pytest.raises(ConfigError, match=message):
        labelled(tmp_path, labels, dev, **options)


def test_label_ids_do_not_depend_on_the_subset(tmp_path):
    """Guards against ids that shift when a class is not drawn."""
    labels = ["a", "b", "c"] + ["a", "c"] * 20
    data = labelled(tmp_path, labels, max_train_samples=8)
    assert set(data.train["label"]) == {0, 2}
    assert data.label_names == ("a", "b", "c")
