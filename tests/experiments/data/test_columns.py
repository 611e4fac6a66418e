"""Which columns are text and which is the label."""

import json

import pytest

from fish_tuning.experiments.errors import ConfigError
from tests.experiments.data.local_data import load, write


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"review_body": "a b", "user_id": "x y"}, ("review_body",)),
        ({"premise": "a b", "hypothesis": "c d", "text": "e f"}, ("premise", "hypothesis")),
        ({"question": "a b", "sentence": "c d"}, ("question", "sentence")),
        ({"headline": "a b", "body": "c d", "year": 3}, ("headline", "body")),
        ({"code": "x1", "words": "a b c"}, ("words",)),
        ({"code": "x1"}, ("code",)),
    ],
)
def test_text_columns_are_found(tmp_path, columns, expected):
    """Guards the choice: known names first, then what has words; ids and numbers never."""
    records = [{**columns, "label": i % 2} for i in range(4)]
    path = write(tmp_path / "a.json", json.dumps(records))
    assert load(path, validation_fraction=0.5).text_columns == expected


COLUMN_ERRORS = [
    ({"a": "b c", "d": "e f", "g": "h i", "label": 0}, {}, r"several of .*could .*: a, d, g; name"),
    ({"a": 1, "label": 0}, {}, r"text_column: none of the columns could be the text: a, label"),
    (
        {"a": "b c"},
        {},
        r"label_column: none of the columns a has a usual name of labels, such as label; name the",
    ),
    ({"a": "b c", "labl": 0}, {"label_column": "lable"}, r"no column 'lable', only a, labl; did"),
    ({"a": "b c", "label": 0}, {"text_column": "zzz"}, r"no column 'zzz', only a, label; name one"),
    ({"a": None, "label": 0}, {"text_column": "a"}, r"text_column 'a' .*row 1: None is not text"),
]


@pytest.mark.parametrize(("row", "options", "message"), COLUMN_ERRORS)
def test_column_errors(tmp_path, row, options, message):
    """Guards that a wrong column is answered with the columns there are."""
    path = write(tmp_path / "a.json", json.dumps([row, {**row, "label": 1}] * 3))
    if "label" not in row:
        path = write(tmp_path / "a.json", json.dumps([row] * 3))
    with pytest.raises(ConfigError, match=message):
        load(path, **options)
