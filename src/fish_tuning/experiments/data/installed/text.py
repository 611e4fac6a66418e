"""A real text classification task with nothing to download: which package does this document?

The docstrings of installed packages are natural English that comes with a label, the package. A
sentence is the first paragraph of a docstring of a module, class or function. Sources are parsed,
never imported.
"""

import ast
import gc
import hashlib
import importlib.util
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

DEFAULT_PACKAGES = ("torch", "transformers", "scipy", "sklearn", "networkx", "sympy")

MIN_CHARS, MAX_CHARS = 30, 220
VALIDATION_SHARE = 0.2
NEUTRAL = "NAME"

# Words that name a package without containing its import name.
_ALIASES = {
    "matplotlib": ("mpl", "plt", "pyplot"),
    "networkx": ("nx",),
    "numpy": ("np",),
    "pandas": ("pd",),
    "sklearn": ("scikit-learn", "scikit"),
    "torch": ("aten",),
    "transformers": ("huggingface", "hugging face"),
}
_SKIPPED_FOLDERS = {"test", "tests", "testing", "_testing", "__pycache__"}
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
"""What can have a docstring."""

# Words spelled as only programs spell them: dotted.paths, snake_case, CamelCase, LSTMCell.
_IDENTIFIER = re.compile(
    r"""
    \b(?:
        [A-Za-z_]\w+(?:\.[A-Za-z_]\w+)+
      | \w*[A-Za-z0-9]_+[A-Za-z0-9]\w*
      | \w*[a-z0-9][A-Z]\w*
      | \w*[A-Z]{2}[a-z]{2}\w*
    )
    """,
    re.VERBOSE,
)


def load_installed_text(
    packages: Sequence[str] = DEFAULT_PACKAGES,
    per_class: int = 1000,
    validation_per_class: int = 200,
    seed: int = 0,
) -> DatasetDict:
    """Load sentences from the docstrings of installed packages, labeled by package.

    - A sentence has 30 to 220 characters after runs of white space are collapsed.
    - Names that give the package away are replaced by a neutral token: the names of all
      `packages`, and every identifier (dotted, snake_case or CamelCase).
    - Sentences are distinct even after they are normalized: lower-cased, without digits and
      punctuation. A sentence that two packages share is left out. A hash of the normalized form
      decides between training and validation, so near-duplicates are never on both sides, and
      the side does not depend on `seed`.
    - Every class has the same number of sentences in each split: the requested number, or as many
      as the smallest class has. `seed` chooses the sentences and their order.

    The sentences depend on the installed versions of the packages.

    Args:
        packages: Import names of installed packages; at least two.
        per_class: Maximum number of training sentences per class.
        validation_per_class: Maximum number of validation sentences per class.
        seed: Chooses and orders the sentences.

    Returns:
        Splits `train` and `validation` with columns `text` and `label`.

    Raises:
        ModuleNotFoundError: A package is not installed.
        ValueError: There are fewer than two packages, a count is below 1, or a package has no
            usable sentence.
    """
    if len(set(packages)) < 2 or len(set(packages)) < len(packages):
        raise ValueError(f"packages must be two or more distinct names, not {list(packages)}")
    if per_class < 1 or validation_per_class < 1:
        raise ValueError(
            "per_class and validation_per_class must be at least 1, "
            f"not {per_class} and {validation_per_class}"
        )
    sizes = {"train": per_class, "validation": validation_per_class}
    names = _name_pattern(packages)
    # Twice the number leaves a choice without parsing all of a large package.
    enough = {split: 2 * size for split, size in sizes.items()}
    found = {package: _collect(package, names, enough, seed) for package in packages}
    owners = Counter(key for sentences in found.values() for key in sentences)
    own = {
        p: {key: text for key, text in sentences.items() if owners[key] == 1}
        for p, sentences in found.items()
    }
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(packages))})
    return DatasetDict(
        {split: _balanced(own, split, size, seed, features) for split, size in sizes.items()}
    )


def docstrings(package: str) -> Iterator[str]:
    """Yield all docstrings of an installed package, except its tests, as in the sources.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    return _docstrings(parsed_sources(package))


def _balanced(
    found: dict[str, dict[str, str]], split: str, size: int, seed: int, features: Features
) -> Dataset:
    """Choose the same number of sentences of each package for one split, in seeded order."""
    keys = {
        package: sorted(
            (key for key in sentences if _split_of(key) == split),
            key=lambda key: stable_hash(f"{seed} {key}"),
        )
        for package, sentences in found.items()
    }
    for package, available in keys.items():
        if not available:
            raise ValueError(
                f"no usable sentence for the {split} split in the documentation of {package!r}; "
                "choose a larger package"
            )
    size = min(size, *(len(available) for available in keys.values()))
    rows = [
        (key, found[package][key], label)
        for label, (package, available) in enumerate(keys.items())
        for key in available[:size]
    ]
    rows.sort(key=lambda row: stable_hash(f"{seed} order {row[0]}"))
    return Dataset.from_dict(
        {"text": [text for _, text, _ in rows], "label": [label for *_, label in rows]},
        features=features,
    )


def _collect(
    package: str, names: re.Pattern[str], enough: dict[str, int], seed: int
) -> dict[str, str]:
    """Map the normalized form of each sentence of a package to the sentence with names masked.

    Reads file after file until there are `enough` sentences for each split.
    """
    found: dict[str, str] = {}
    counts: Counter[str] = Counter()
    with _parsing_many():
        for path in _source_files(package, seed):
            for docstring in _docstrings(_documented(path)):
                text = _sentence(docstring, names)
                if text is not None and (key := _normalize(text)) not in found:
                    found[key] = text
                    counts[_split_of(key)] += 1
            if all(counts[split] >= size for split, size in enough.items()):
                break
    return found


def _source_files(package: str, seed: int) -> list[Path]:
    """List the Python files of an installed package, except its tests, in seeded order."""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        raise ModuleNotFoundError(
            f"package {package!r} is not installed; install it or leave it out of packages",
            name=package,
        )
    roots = [Path(root) for root in spec.submodule_search_locations or ()]
    if not roots:
        raise ValueError(f"{package!r} is a single module, not a package; leave it out of packages")
    files = {
        path.relative_to(root).as_posix(): path
        for root in roots
        for path in root.rglob("*.py")
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
        and not path.name.startswith(("test_", "conftest"))
    }
    return [files[name] for name in sorted(files, key=lambda name: stable_hash(f"{seed} {name}"))]


@contextmanager
def _parsing_many() -> Iterator[None]:
    """Silence warnings about the parsed sources, and pause the garbage collector.

    A syntax tree is many small objects without cycles: collecting garbage while parsing more than
    doubles the time and frees nothing.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if was_enabled:
            gc.enable()


def _docstrings(nodes: Iterable[Documented]) -> Iterator[str]:
    """Yield the docstrings of modules, classes and functions that have one."""
    for node in nodes:
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield docstring


def parsed_sources(package: str) -> Iterator[Documented]:
    """Yield the modules, classes and functions of an installed package, except its tests.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    with _parsing_many():
        for path in _source_files(package, seed=0):
            yield from _documented(path)


def _documented(path: Path) -> Iterator[Documented]:
    """Yield a file's module, classes and functions, in order."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError):
        return
    pending: list[ast.stmt | ast.Module] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, Documented):
            yield node
            pending.extend(reversed(node.body))


def _sentence(docstring: str, names: re.Pattern[str]) -> str | None:
    """Return a docstring's first paragraph with names masked, or None if its length is wrong."""
    paragraph = inspect.cleandoc(docstring).split("\n\n", 1)[0]
    text = " ".join(paragraph.split())
    if not MIN_CHARS <= len(text) <= MAX_CHARS:
        return None
    text = _IDENTIFIER.sub(NEUTRAL, names.sub(NEUTRAL, text))
    if len(text.replace(NEUTRAL, "").strip()) < MIN_CHARS or len(text) > MAX_CHARS:
        return None
    return text


def _name_pattern(packages: Sequence[str]) -> re.Pattern[str]:
    """Match the packages' names, in any dotted word that contains one, and their aliases."""
    words = "|".join(rf"[\w.]*{re.escape(package)}(?:[\w.]*\w)?" for package in packages)
    aliases = [re.escape(alias) for p in packages for alias in _ALIASES.get(p, ())]
    alone = "".join(rf"|\b{alias}\b" for alias in aliases)
    return re.compile(words + alone, re.IGNORECASE)


def _normalize(text: str) -> str:
    """Remove what near-duplicates differ in: case, digits, punctuation, white space."""
    return " ".join(re.sub(r"[\W\d_]+", " ", text.lower()).split())


def _split_of(key: str) -> str:
    return "validation" if stable_hash(key) < VALIDATION_SHARE * 2**64 else "train"


def stable_hash(text: str) -> int:
    """Return a number between 0 and 2**64 that is the same in every process."""
    # Python's own hash() differs from process to process.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
