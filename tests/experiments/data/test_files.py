"""Local tables in every format and shape that people keep, and what is said about broken ones."""

import csv
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fish_tuning.experiments.config.dataset import DatasetConfig
from fish_tuning.experiments.data.load import load_data
from fish_tuning.experiments.errors import ConfigError
from tests.experiments.data.local_data import TEXTS, load, rows, write


def test_header_and_ids(tmp_path):
    """Guards SST-2's shape: folder of train and dev, a header, integer labels."""
    write(tmp_path / "train.tsv", "sentence\tlabel\nso good \t1\nso bad\t0\nfine\t1\n")
    write(tmp_path / "dev.tsv", "sentence\tlabel\nnot so bad\t1\n")
    write(tmp_path / "test.tsv", "index\tsentence\n0\tnot looked at\n")
    data = load(tmp_path, name="SST-2")
    assert rows(data.train) == [("so good ", 1), ("so bad", 0), ("fine", 1)]
    assert rows(data.validation) == [("not so bad", 1)]
    assert (data.text_columns, data.label_column) == (("sentence",), "label")
    assert (data.task, data.num_labels, data.label_names) == ("classification", 2, ("0", "1"))
    assert data.metrics == ("accuracy",)


def test_byte_order_mark_pairs_and_quotation_marks(tmp_path):
    """Guards MRPC's shape: a marked file with CRLF, ids to skip, pairs, lone quotation marks."""
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    body = '1\t70\t71\tHe said " yes .\t" Yes , he said .\r\n0\t80\t81\tA "dog".\tA cat\r\n'
    write(tmp_path / "train.tsv", header + body)
    write(tmp_path / "dev.tsv", header + body)
    data = load(tmp_path, name="MRPC")
    assert data.text_columns == ("#1 String", "#2 String")
    assert data.label_column == "Quality"
    assert rows(data.train) == [
        ('He said " yes .', '" Yes , he said .', 1),
        ('A "dog".', "A cat", 0),
    ]
    assert data.metrics == ("accuracy", "f1")


def test_labels_as_text(tmp_path):
    """Guards RTE's shape: ids in sorted order, whatever comes first in the file."""
    header = "index\tsentence1\tsentence2\tlabel\n"
    write(tmp_path / "train.tsv", header + "0\ta b\tc d\tnot_entailment\n1\te f\tg h\tentailment\n")
    write(tmp_path / "dev.tsv", header + "0\ti j\tk l\tentailment\n")
    data = load(tmp_path)
    assert data.text_columns == ("sentence1", "sentence2")
    assert data.label_names == ("entailment", "not_entailment")
    assert data.train["label"][:] == [1, 0]
    assert data.validation["label"][:] == [0]


@pytest.mark.parametrize(
    ("options", "text", "label"),
    [
        ({"columns": ["source", "label", "mark", "sentence"]}, "sentence", "label"),
        ({"header": False, "label_column": 1, "text_column": 3}, "3", "1"),
        ({"header": False, "label_column": 1}, "3", "1"),
    ],
)
def test_no_header(tmp_path, options, text, label):
    """Guards CoLA's shape: the first line is data, a code and a mark stand beside the sentence."""
    lines = "gj04\t1\t\tOur friends won't buy it.\ngj04\t0\t*\tOur friend buy not.\n"
    write(tmp_path / "train.tsv", lines)
    write(tmp_path / "dev.tsv", lines)
    data = load(tmp_path, name="CoLA", **options)
    assert (data.text_columns, data.label_column) == ((text,), label)
    assert rows(data.train) == [("Our friends won't buy it.", 1), ("Our friend buy not.", 0)]
    assert data.metrics == ("matthews_correlation", "accuracy")


def test_header_taken_for_granted(tmp_path):
    """Guards the remedy where a file without a header is read as if it had one."""
    path = write(tmp_path / "train.tsv", "gj04\t1\t\tOur friends.\ngj04\t0\t*\tOur friend.\n")
    with pytest.raises(ConfigError, match=r"gj04, 1, 2, Our friends\. .*dataset\.header: false"):
        load(path)


def test_csv_quotes_line_breaks_and_delimiter(tmp_path):
    """Guards standard CSV: quoted delimiters, doubled quotes, line breaks inside fields."""
    path = tmp_path / "data.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=";")
        texts = ['says "hi"; twice', "two\nlines", "x" * 200_000, "plain one"]
        writer.writerows([["text", "label"], *((text, i % 2) for i, text in enumerate(texts))])
    before = csv.field_size_limit()
    data = load(path, delimiter=";", validation_fraction=0.5)
    assert sorted([*data.train["text"], *data.validation["text"]]) == sorted(texts)
    assert csv.field_size_limit() == before


def test_quoting_can_be_set(tmp_path):
    """Guards `quoting` against being ignored in either format."""
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"a b"\t0\n"c d"\t1\n"a b"\t0\n"c d"\t1\n')
    assert set(load(path, validation_fraction=0.5).train["text"]) == {'"a b"', '"c d"'}
    quoted = load(path, validation_fraction=0.5, quoting=True)
    assert set(quoted.train["text"]) == {"a b", "c d"}


def test_unnamed_index_column(tmp_path):
    """Guards the file that pandas writes with its index: the first header field is empty."""
    path = write(tmp_path / "a.csv", ",text,label\n0,a b,0\n1,c d,1\n2,a b,0\n3,c d,1\n")
    assert load(path, validation_fraction=0.5).text_columns == ("text",)


RECORDS = [{"text": text, "label": i % 3, "extra": [i]} for i, text in enumerate(TEXTS)]


def parquet(path, records):
    table = pa.Table.from_pylist(records)
    names = pa.array(["a", "b", "c"]).dictionary_encode()
    table = table.append_column("name", names.take(pa.array([r["label"] for r in records])))
    pq.write_table(table, path)


WRITERS = {
    "json": lambda path: path.write_text(json.dumps(RECORDS)),
    "marked.json": lambda path: path.write_text(json.dumps(RECORDS), encoding="utf-8-sig"),
    "jsonl": lambda path: path.write_text("\n\n".join(map(json.dumps, RECORDS)) + "\n"),
    # Lines of objects are often called .json.
    "lines.json": lambda path: path.write_text("\n".join(map(json.dumps, RECORDS))),
    "parquet": lambda path: parquet(path, RECORDS),
    "csv": lambda path: path.write_text(
        "text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in RECORDS)
    ),
}


@pytest.mark.parametrize("format", WRITERS)
def test_formats_give_the_same_data(tmp_path, format):
    """Guards every format against the same oracle, the rows that were written."""
    path = tmp_path / f"data.{format}"
    WRITERS[format](path)
    data = load(path, validation_fraction=0.25)
    expected = sorted((r["text"], r["label"]) for r in RECORDS)
    assert sorted([*rows(data.train), *rows(data.validation)]) == expected
    assert data.label_names == ("0", "1", "2")


def test_categories_in_parquet(tmp_path):
    """Guards pandas' categorical columns, which datasets does not read by itself."""
    parquet(tmp_path / "a.parquet", RECORDS)
    data = load(tmp_path / "a.parquet", label_column="name")
    assert data.label_names == ("a", "b", "c")


def test_json_of_mixed_types_and_missing_keys(tmp_path):
    """Guards JSON whose unused fields Arrow cannot put into one column."""
    records = [{"text": "a b", "label": 1, "x": 1}, {"text": "c d", "label": "0", "x": {"y": 1}}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records * 2 + records)))
    data = load(path, validation_fraction=0.4)
    assert Counter(rows(data.train)) == {("a b", 1): 2, ("c d", 0): 2}


BROKEN = [
    ("a.tsv", "text\tlabel\na b\t0\nc d\n", r"line 3: 1 fields where 2 are expected \(text, label"),
    ("a.csv", "text,label\na,b,0\n", r"line 2: 3 fields where 2"),
    ("a.csv", 'text,label\n"a "b" c",0\n', r"line 2: .*set dataset\.quoting: false"),
    ("a.csv", 'text,label\n"a b,0\nc,1\n', r"line 3: unexpected end of data"),
    ("a.csv", "", "is empty; give a file with rows"),
    ("a.csv", "text,label\n", "'train' has no rows"),
    ("a.csv", "text,text,label\na,b,0\n", "has the column 'text' twice"),
    ("a.json", '[{"text": "a"},\n{"text": }]', r"line 2: is not JSON"),
    ("a.json", '[{"text": "a"}, 3]', r"row 2: is a int; rows must be objects"),
    ("a.json", "[]", "'train' has no rows"),
    ("a.jsonl", '{"text": "a"}\n{"text":\n', r"line 2: is not JSON: .*; one object per line"),
    ("a.parquet", "not parquet", r"is not a Parquet file"),
    ("a.xlsx", "x", r"is not that of a known format; set dataset\.format"),
]


@pytest.mark.parametrize(("name", "text", "message"), BROKEN)
def test_broken_files(tmp_path, name, text, message):
    """Guards that what is wrong with a file is said with the file and the line."""
    path = write(tmp_path / name, text)
    with pytest.raises(ConfigError, match=message):
        load(path)


def test_wrong_encoding(tmp_path):
    """Guards Windows exports in other encodings."""
    path = write(tmp_path / "a.csv", "text,label\nnaïve,0\n", "latin-1")
    with pytest.raises(ConfigError, match=r"is not UTF-8 text \(byte 13\); save it as UTF-8"):
        load(path)


def test_paths_with_nothing_there(tmp_path, tsv):
    """Guards the commonest wrong paths, and folders with too much or too little in them."""
    with pytest.raises(ConfigError, match=r"dataset\.path: there is no file .*none\.csv"):
        load(tmp_path / "none.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no file ending in \.csv"):
        load(tmp_path / "empty")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ConfigError, match=r"is a folder; name a file"):
        load_data(DatasetConfig(path={"train": str(tmp_path / "folder.csv")}))
    write(tmp_path / "both" / "train.csv", "text,label\na b,0\nc d,1\na,0\nc,1")
    write(tmp_path / "both" / "train.tsv", "text\tlabel\n")
    with pytest.raises(ConfigError, match=r"holds train\.csv and train\.tsv; set dataset\.format"):
        load(tmp_path / "both")
    assert load(tmp_path / "both", format="csv", validation_fraction=0.5).text_columns == ("text",)


def test_unreadable_file(tmp_path, monkeypatch, tsv):
    """Guards the message for a file that may not be read."""

    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refused)
    with pytest.raises(ConfigError, match=r"data\.tsv' cannot be read: .*Permission denied"):
        load(tsv)
