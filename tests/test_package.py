"""The package as a whole: its public names, what it imports, and the size of its parts."""

import ast
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

import fish_tuning

ROOT = Path(__file__).parents[1]
SOURCE = Path(fish_tuning.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION, LARGEST_PACKAGE = 400, 60, 2000


def test_every_public_name_is_there():
    """Guards against a name that is announced and cannot be imported."""
    assert sorted(fish_tuning._HOMES) == fish_tuning.__all__
    for name in fish_tuning.__all__:
        assert getattr(fish_tuning, name).__doc__


def test_import_takes_no_torch():
    """Guards the command line's --help against a second of imports."""
    program = "import fish_tuning, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_oldest_versions_are_the_lower_bounds():
    """Guards against a lower bound that no test has ever run with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    pinned = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    tested = {Requirement(line) for line in pinned if not line.startswith("#")}
    versions = {r.name: next(iter(r.specifier)).version for r in tested}
    assert versions.keys() >= {Requirement(line).name for line in wanted}
    for requirement in map(Requirement, wanted):
        (bound,) = requirement.specifier
        assert Version(versions[requirement.name]) == Version(bound.version), requirement.name


def lines_of(function):
    """Lines of a function, without its docstring."""
    lines = function.end_lineno - function.lineno + 1
    docstring = function.body[0]
    if ast.get_docstring(function) is not None:
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def test_files_and_functions_stay_small():
    """Guards against a file that collects several ideas, and a function that nobody can follow."""
    found = {}
    for file in FILES:
        name, text = file.relative_to(SOURCE).as_posix(), file.read_text(encoding="utf-8")
        lengths = {name: len(text.splitlines())} if text.count("\n") > LONGEST_FILE else {}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and lines_of(node) > LONGEST_FUNCTION:
                lengths[f"{name}:{node.name}"] = lines_of(node)
        found |= lengths
    assert not found


def test_packages_stay_small():
    """Guards against a folder that nobody can read in an afternoon."""
    lines = Counter()
    for file in FILES:
        lines[file.parent.name] += len(file.read_text(encoding="utf-8").splitlines())
    assert not {name: n for name, n in lines.items() if n > LARGEST_PACKAGE}
