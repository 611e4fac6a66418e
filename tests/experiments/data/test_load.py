"""Data as people keep it: what is found, what is decided, and what is said where it is broken."""

import csv
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

import fish_tuning.experiments.data.load as data_module
from fish_tuning.experiments.config.schema import DatasetConfig
from fish_tuning.experiments.data.load import load_data, tokenize
from fish_tuning.experiments.errors import ConfigError

TEXTS = [f"sentence number {i} of them" for i in range(12)]


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return str(path)


def load(path=None, **options):
    return load_data(DatasetConfig(path=path if path is None else str(path), **options))


def rows(data):
    return list(zip(*(data[column][:] for column in data.column_names), strict=True))


@pytest.fixture
def tsv(tmp_path):
    lines = ["text\tlabel", *(f"{text}\t{i % 2}" for i, text in enumerate(TEXTS))]
    return write(tmp_path / "data.tsv", "\n".join(lines))


# The four shapes of GLUE's files


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
    with pytest.raises(ConfigError, match=r"gj04, 1, 2, Our friends\.; .*dataset\.header: false"):
        load(path)


# Formats


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
    """Guards splits under names and endings of one's own."""
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

    monkeypatch.setattr(data_module.datasets, "load_dataset", load_dataset)
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

    monkeypatch.setattr(data_module.datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ConfigError, match=r"dataset\.load_args: \['x'\] .*UnreachableError: no route;"
    ):
        load(load_args=["x"])


def test_installed_text(monkeypatch):
    """Guards the packaged data set's special name."""
    split = Dataset.from_dict({"text": ["a b", "c d"], "label": [0, 1]})
    monkeypatch.setattr(
        "fish_tuning.experiments.data.installed_text.load_installed_text",
        lambda: DatasetDict({"train": split, "validation": split}),
    )
    assert load(name="installed_text").text_columns == ("text",)


# Labels


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
    ([0, 1], [0, 7], {}, r"'dev', row 2: 7 is none of the labels .*\('0', '1'\)"),
    (["a", "b"], ["a", "c"], {}, r"'dev', row 2: 'c' is none of the labels .*'a', 'b'"),
    ([0, 1], ["0", "x"], {}, r"'dev', row 2: 'x' is not a number"),
    ([0.5, 1], ["0.5", "x"], {}, r"'dev', row 2: 'x' is not a number"),
    ([0, 1], [-1, -1], {}, r"'dev': every label is -1"),
    ([[0], [1]], None, {}, r"the label \[0\] is a list; one label an example"),
    (["a", "b"], None, {"task": "regression"}, r"'a', 'b' are not numbers"),
    ([0.5, 1], None, {"task": "classification"}, r"fractional part are no classes"),
    ([0.5, 1], None, {"num_labels": 2}, r"dataset\.num_labels: .*have a fractional part"),
    (["a", "b"], None, {"num_labels": 3}, r"num_labels: is 3, but .* has 2 classes \('a', 'b'\)"),
    (["a", "b"], None, {"label_names": ["a", "x"]}, r"row 2: 'b' is none of .*'a', 'x'"),
    (list(range(30)), None, {}, r"30 distinct values in 30 rows are no classes; .*regression"),
    ([0, 1], None, {"metric": "mse"}, r"dataset\.metric: 'mse' does not measure classification"),
]


@pytest.mark.parametrize(("labels", "dev", "options", "message"), BAD_LABELS)
def test_bad_labels(tmp_path, labels, dev, options, message):
    """Guards against training on labels that are no labels."""
    with pytest.raises(ConfigError, match=message):
        labelled(tmp_path, labels, dev, **options)


# Splits


def test_held_out_share(tmp_path):
    """Guards the made validation split: stratified, disjoint, complete, and always the same."""
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


def test_label_ids_do_not_depend_on_the_subset(tmp_path):
    """Guards against ids that shift when a class is not drawn."""
    labels = ["a", "b", "c"] + ["a", "c"] * 20
    data = labelled(tmp_path, labels, max_train_samples=8)
    assert set(data.train["label"]) == {0, 2}
    assert data.label_names == ("a", "b", "c")


def test_splits_that_do_not_exist(tsv):
    """Guards the messages about splits, with the names there are."""
    with pytest.raises(ConfigError, match=r"train_split: there is no split 'tr', only train; name"):
        load(tsv, train_split="tr")
    with pytest.raises(ConfigError, match=r"no split 'validation', only train; .*hold out a share"):
        load(tsv, validation_split="validation")
    with pytest.raises(ConfigError, match=r"validation_fraction: 0\.01 of 12 examples leaves a sp"):
        load(tsv, validation_fraction=0.01)


# Columns


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
    ({"a": "b c"}, {}, r"label_column: none of the columns has the name of a label: a; name the"),
    ({"a": "b c", "labl": 0}, {"label_column": "lable"}, r"no column 'lable', only a, labl; did"),
    ({"a": "b c", "label": 0}, {"text_column": "zzz"}, r"no column 'zzz', only a, label; name one"),
    ({"a": None, "label": 0}, {"text_column": "a"}, r"text_column 'a' .*row 1: None is no text"),
]


@pytest.mark.parametrize(("row", "options", "message"), COLUMN_ERRORS)
def test_column_errors(tmp_path, row, options, message):
    """Guards that a wrong column is answered with the columns there are."""
    path = write(tmp_path / "a.json", json.dumps([row, {**row, "label": 1}] * 3))
    if "label" not in row:
        path = write(tmp_path / "a.json", json.dumps([row] * 3))
    with pytest.raises(ConfigError, match=message):
        load(path, **options)


def test_validation_without_the_columns(tmp_path):
    """Guards splits whose columns differ, as GLUE's test files do."""
    write(tmp_path / "train.tsv", "text\tlabel\na b\t0\nc d\t1\n")
    write(tmp_path / "dev.tsv", "index\ttext\n0\ta b\n")
    with pytest.raises(ConfigError, match=r"'dev' has no column 'label', only index, text; use"):
        load(tmp_path)


# Broken files

BROKEN = [
    ("a.tsv", "text\tlabel\na b\t0\nc d\n", r"line 3: 1 fields where 2 are expected \(text, label"),
    ("a.csv", "text,label\na,b,0\n", r"line 2: 3 fields where 2"),
    ("a.csv", 'text,label\n"a "b" c",0\n', r"line 2: .*set dataset\.quoting: false"),
    ("a.csv", 'text,label\n"a b,0\nc,1\n', r"line 3: unexpected end of data"),
    ("a.csv", "", "is empty; give a file with rows"),
    ("a.csv", "text,label\n", "'train' has no rows"),
    ("a.csv", "text,text,label\na,b,0\n", "has the column 'text' twice"),
    ("a.json", '[{"text": "a"},\n{"text": }]', r"line 2: is no JSON"),
    ("a.json", '[{"text": "a"}, 3]', r"row 2: is a int; rows must be objects"),
    ("a.json", "[]", "'train' has no rows"),
    ("a.jsonl", '{"text": "a"}\n{"text":\n', r"line 2: is no JSON: .*; one object a line"),
    ("a.parquet", "not parquet", r"is no Parquet file"),
    ("a.xlsx", "x", r"is not told by its ending; set dataset\.format"),
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


def test_saved_dataset_that_is_broken(tmp_path):
    """Guards a folder that only looks like a saved data set."""
    write(tmp_path / "state.json", "{}")
    with pytest.raises(ConfigError, match=r"dataset\.path: .* cannot be loaded: "):
        load(tmp_path)


# Tokens


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
