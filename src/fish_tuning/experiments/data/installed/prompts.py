"""Data for language models that needs no download: documentation of what is installed."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator

from datasets import Dataset, DatasetDict

from fish_tuning.experiments.data.installed.text import parsed_sources, stable_hash

PACKAGES = ("sklearn", "scipy", "networkx")
_PER_PACKAGE, _VALIDATION_SHARE = 1000, 0.2
_CHARS = (20, 100)
_REFERENCE_CHARS = (200, 600)


def load_docstrings() -> DatasetDict:
    """Load functions of installed packages: the signature as prompt, what it does as completion.

    The prompt is an instruction and the line `def name(arguments):`; the completion is the first
    sentence of the function's docstring, of 20 to 100 characters. Sentences are distinct; a hash
    of each decides between training and validation.

    Returns:
        Splits `train` and `validation` with columns `prompt` and `completion`.
    """
    found: dict[str, str] = {}
    for package in PACKAGES:
        rows = list(_functions(package))
        rows.sort(key=lambda row: stable_hash(row[1]))
        for signature, sentence in rows[:_PER_PACKAGE]:
            found.setdefault(sentence, f"Describe this function in one sentence.\n{signature}\n")
    return _split({prompt: sentence for sentence, prompt in found.items()})


def load_reference() -> DatasetDict:
    """Load paragraphs of Python's manual, which is installed with it: text unrelated to tasks.

    Returns:
        Split `validation` with the column `text`.
    """
    from pydoc_data.topics import topics

    paragraphs = {
        " ".join(paragraph.split()): None
        for name in sorted(topics)
        for paragraph in topics[name].split("\n\n")
    }
    low, high = _REFERENCE_CHARS
    texts = [text for text in paragraphs if low <= len(text) <= high and text[0].isupper()]
    return DatasetDict({"validation": Dataset.from_dict({"text": sorted(texts, key=stable_hash)})})


def _functions(package: str) -> Iterator[tuple[str, str]]:
    """Yield the signature and the first sentence of each documented function of a package."""
    for node in parsed_sources(package):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            docstring = ast.get_docstring(node, clean=False) or ""
            paragraph = " ".join(inspect.cleandoc(docstring).split("\n\n", 1)[0].split())
            sentence = paragraph.partition(". ")[0].rstrip(".") + "."
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg != "self"]
            signature = f"def {node.name}({', '.join(names[:6])}):"
            if _CHARS[0] <= len(sentence) <= _CHARS[1] and sentence.isascii():
                yield signature, sentence


def _split(completions: dict[str, str]) -> DatasetDict:
    splits: dict[str, dict[str, list[str]]] = {
        name: {"prompt": [], "completion": []} for name in ("train", "validation")
    }
    for prompt in sorted(completions, key=stable_hash):
        sentence = completions[prompt]
        held_out = stable_hash(f"split {sentence}") < _VALIDATION_SHARE * 2**64
        columns = splits["validation" if held_out else "train"]
        columns["prompt"].append(prompt)
        columns["completion"].append(sentence)
    return DatasetDict({name: Dataset.from_dict(rows) for name, rows in splits.items()})
