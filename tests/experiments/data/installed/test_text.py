"""Sentences of installed packages: parsed, masked, balanced, and split without a leak."""

import gc
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest

from fish_tuning.experiments.data.installed import text as installed_text
from fish_tuning.experiments.data.installed.text import (
    DEFAULT_PACKAGES,
    MAX_CHARS,
    MIN_CHARS,
    _normalize,
    load_installed_text,
)

WORDS = ("apple", "bridge", "candle", "desert", "engine", "forest", "garden", "harbour", "island")


def sentence(topic: str, number: int) -> str:
    """Return a sentence that differs from all others in words, not only in digits."""
    first, second, third = (WORDS[number // 9**place % 9] for place in range(3))
    return f"Compute the {topic} of the {first} beside the {second} and the {third}."


def write_package(folder: Path, name: str, docstrings: list[str], extra: str = "") -> None:
    """Write a package that fails when imported, one function per docstring."""
    package = folder / name
    package.mkdir(parents=True, exist_ok=True)
    body = "".join(f'def f{i}():\n    """{text}"""\n\n\n' for i, text in enumerate(docstrings))
    (package / "__init__.py").write_text(f"raise RuntimeError('imported')\n\n\n{body}{extra}")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on sys.path with two packages of 60 and 40 sentences."""
    monkeypatch.syspath_prepend(tmp_path)
    write_package(tmp_path, "fakeone", [sentence("weight", i) for i in range(60)])
    write_package(tmp_path, "faketwo", [sentence("length", i) for i in range(40)])
    return tmp_path


def texts_of(site: Path, docstrings: list[str], name: str = "fakethree") -> set[str]:
    """Return every sentence taken from a package with some docstrings more."""
    write_package(site, name, [*(sentence("colour", i) for i in range(30)), *docstrings])
    data = load_installed_text([name, "fakeone"])
    return {
        row["text"]
        for split in data.values()
        for row in split
        if row["label"] == 0 and "the colour of" not in row["text"]
    }


def test_labels_are_packages_and_nothing_is_imported(site: Path) -> None:
    """Guards against running foreign code, and against labels in another order."""
    data = load_installed_text(["faketwo", "fakeone"])
    assert list(data) == ["train", "validation"]
    assert data["train"].column_names == ["text", "label"]
    assert data["train"].features["label"].names == ["faketwo", "fakeone"]
    for row in data["train"]:
        assert ("length" if row["label"] == 0 else "weight") in row["text"]
    assert not {"fakeone", "faketwo"} & set(sys.modules)


def test_classes_are_balanced(site: Path) -> None:
    """Guards against an accuracy that the larger package explains."""
    for split in load_installed_text(["fakeone", "faketwo"]).values():
        counts = Counter(split["label"])
        assert counts[0] == counts[1] > 0
    small = load_installed_text(["fakeone", "faketwo"], per_class=5, validation_per_class=2)
    assert {name: len(split) for name, split in small.items()} == {"train": 10, "validation": 4}


def test_few_training_sentences_leave_the_validation_whole(site: Path) -> None:
    """Guards against reading too few files: only one sentence in five is for validation."""
    for name, topic in (("fakeone", "area"), ("faketwo", "depth")):
        for part in range(200):
            path = site / name / f"part{part}.py"
            path.write_text(f'"""{sentence(topic, part)}"""\n')
    data = load_installed_text(["fakeone", "faketwo"], per_class=2, validation_per_class=20)
    assert {name: len(split) for name, split in data.items()} == {"train": 4, "validation": 40}


def test_same_seed_same_data_and_sides_do_not_move(site: Path) -> None:
    """Guards against a validation sentence of one seed that another seed trains on."""
    one, again, other = (
        load_installed_text(["fakeone", "faketwo"], per_class=10, seed=seed) for seed in (0, 0, 1)
    )
    assert one["train"].to_dict() == again["train"].to_dict()
    assert one["train"]["text"] != other["train"]["text"]
    for a, b in ((one, other), (other, one)):
        assert not set(a["train"]["text"]) & set(b["validation"]["text"])


def test_near_duplicates_are_one_sentence(site: Path) -> None:
    """Guards against a leak: copies that differ in case, digits or punctuation."""
    copies = [f"Return the value of order {i}, {w} it is" for i in range(40) for w in ("as", "AS")]
    assert len(texts_of(site, copies)) == 1
    data = load_installed_text(["fakethree", "fakeone"])
    train, validation = ({_normalize(t) for t in data[s]["text"]} for s in data)
    assert not train & validation
    assert len(train) == len(data["train"])


def test_a_sentence_of_two_packages_is_left_out(site: Path) -> None:
    """Guards against a sentence with two labels."""
    assert texts_of(site, [sentence("weight", i) for i in range(30)]) == set()


def test_names_are_masked(site: Path) -> None:
    """Guards against sentences that name their package or its own classes."""
    docstrings = {
        "Move every fakethree array over to where the FAKEONE one lives.": (
            "Move every NAME array over to where the NAME one lives."
        ),
        "Take what PyFakeThree calls a thing, then call fakethree.nn.Thing.": (
            "Take what NAME calls a thing, then call NAME."
        ),
        "Wrap an LSTMCell, a BigThing or some_helper in an ordinary function.": (
            "Wrap an NAME, a NAME or NAME in an ordinary function."
        ),
        "Keep words, e.g. the GPUs and an ordinary Matrix, as they were written.": (
            "Keep words, e.g. the GPUs and an ordinary Matrix, as they were written."
        ),
    }
    assert texts_of(site, list(docstrings)) == set(docstrings.values())


def test_aliases_are_masked(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against well-known short names, which do not hold the import name."""
    monkeypatch.setitem(installed_text._ALIASES, "fakethree", ("scikit-fake", "sf"))
    text = "Fit what Scikit-Fake fits with sf.fit, and with sf alone, but keep surf as it is."
    masked = "Fit what NAME fits with NAME, and with NAME alone, but keep surf as it is."
    assert texts_of(site, [text]) == {masked}


def test_only_first_paragraphs_of_a_suitable_length(site: Path) -> None:
    """Guards the rule of design: one folded paragraph of 30 to 220 characters."""
    long = "This sentence goes on and on, word after word, without an end. " * 4
    docstrings = [
        "Too short.",
        long,
        "Take the first paragraph\\n    folded into one line.\\n\\n    Not the second paragraph.",
        "Hide big_name_one, big_name_two and big_name_three away.",
    ]
    found = texts_of(site, [text.replace("\\n", "\n") for text in docstrings])
    assert found == {"Take the first paragraph folded into one line."}
    data = load_installed_text(["fakeone", "faketwo"])
    assert all(MIN_CHARS <= len(t) <= MAX_CHARS for t in data["train"]["text"])


def test_methods_count_and_tests_and_broken_files_do_not(site: Path) -> None:
    """Guards against text of test suites, and against a crash on a file for another Python."""
    package = site / "fakethree"
    (package / "tests").mkdir(parents=True)
    hidden = 'def f():\n    """This sentence lives in a test and must stay out."""\n'
    (package / "tests" / "case.py").write_text(hidden)
    (package / "test_more.py").write_text(hidden)
    (package / "broken.py").write_text("print 'a statement of another Python'\n")
    (package / "null.py").write_bytes(b"x = 1\0")
    (package / "warns.py").write_text('"""Warn about an escape in a pattern."""\nx = "\\d" is 1\n')
    (package / "classes.py").write_text(
        'class C:\n    """Describe a class that has one method."""\n'
        '    async def m(self):\n        """Describe the method that the class has."""\n'
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = texts_of(site, [])
    assert found == {
        "Warn about an escape in a pattern.",
        "Describe a class that has one method.",
        "Describe the method that the class has.",
    }
    assert gc.isenabled()


def test_missing_package(site: Path) -> None:
    """Guards against an error that does not name the package."""
    with pytest.raises(ModuleNotFoundError, match="package 'no_such_thing' is not installed"):
        load_installed_text(["fakeone", "no_such_thing"])


def test_package_without_text(site: Path) -> None:
    """Guards against an empty class."""
    write_package(site, "fakeempty", [])
    with pytest.raises(ValueError, match=r"no usable sentence for the train split .* 'fakeempty'"):
        load_installed_text(["fakeone", "fakeempty"])


def test_single_module(site: Path) -> None:
    """Guards against a module without a folder to read."""
    (site / "fakemodule.py").write_text("")
    with pytest.raises(ValueError, match="'fakemodule' is a single module"):
        load_installed_text(["fakeone", "fakemodule"])


@pytest.mark.parametrize("packages", [[], ["fakeone"], ["fakeone", "fakeone", "faketwo"]])
def test_packages_must_be_distinct(site: Path, packages: list[str]) -> None:
    """Guards against a task of one class, or of one class twice."""
    with pytest.raises(ValueError, match="two or more distinct names"):
        load_installed_text(packages)


@pytest.mark.parametrize("counts", [{"per_class": 0}, {"validation_per_class": -1}])
def test_counts_must_be_positive(site: Path, counts: dict[str, int]) -> None:
    """Guards against an empty split."""
    with pytest.raises(ValueError, match="must be at least 1"):
        load_installed_text(["fakeone", "faketwo"], **counts)


@pytest.mark.slow
def test_default_packages() -> None:
    """Guards the task of the quickstart: full classes, and no name left in a sentence."""
    data = load_installed_text()
    assert {name: len(split) for name, split in data.items()} == {
        "train": 1000 * len(DEFAULT_PACKAGES),
        "validation": 200 * len(DEFAULT_PACKAGES),
    }
    texts = " ".join(t.lower() for split in data.values() for t in split["text"])
    assert not [name for name in DEFAULT_PACKAGES if name in texts]
