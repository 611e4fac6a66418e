"""Pages of the docs site that lie outside of docs/: a hook of MkDocs.

The README is the first page. Any other file that a page links to (an example, a table of
benchmarks, the changelog) becomes a page too. Links are written as paths in the repository, so they
also work where the repository is browsed. The page of the command line is made of its help.
"""

import json
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
FIRST = "README.md"
COMMAND_LINE = "reference/command-line.md"
LINK = re.compile(r"""(?P<before>\]\(|(?:src|srcset|href)=")(?P<path>[^)#"\s]+)""")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".sh": "bash"}

_PATHS: dict[str, str] = {}
"""Where pages come from that lie outside of docs/, by their place in the site."""


def on_files(files: Files, config: Any) -> Files:
    """Add the README and, from it and all other pages, whatever they link to."""
    waiting = [FIRST, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if not path.startswith("docs/"):
            files.append(_page(path, config))
        if path.endswith(".md"):
            text = (ROOT / path).read_text(encoding="utf-8")
            linked = {target for match in LINK.finditer(text) if (target := _target(path, match))}
            outside = {t for t in linked - seen if not t.startswith("docs/")}
            waiting += sorted(outside)
            seen |= outside
    files.append(File.generated(config, COMMAND_LINE, content=_command_line()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links that leave docs/, or come from outside, to the pages of the site."""
    uri = page.file.src_uri
    path = _PATHS.get(uri, f"docs/{uri}")

    def led(match: re.Match[str]) -> str:
        target = _target(path, match)
        if target is None:
            return match[0]
        return match["before"] + relpath(_uri(target), str(PurePosixPath(uri).parent))

    return LINK.sub(led, markdown)


def _command_line() -> str:
    program = [sys.executable, "-m", "typer", "fish_tuning.cli", "utils", "docs"]
    options = ["--name", "fish-tuning", "--title", "Command line"]
    return subprocess.run(
        [*program, *options], check=True, capture_output=True, encoding="utf-8"
    ).stdout


def _page(path: str, config: Any) -> File:
    uri = _uri(path)
    _PATHS[uri] = path
    content = _content(ROOT / path, path)
    return File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV)


def _content(file: Path, path: str) -> str:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return text
    if file.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        return "\n\n".join(_cell(cell["cell_type"], "".join(cell["source"])) for cell in cells)
    return f"# {file.name}\n\n`{path}`\n\n{_fenced(text, LANGUAGES.get(file.suffix, 'text'))}"


def _cell(kind: str, source: str) -> str:
    return source if kind == "markdown" else _fenced(source, "python")


def _fenced(text: str, language: str) -> str:
    return f"````{language}\n{text.rstrip()}\n````"


def _target(path: str, match: re.Match[str]) -> str | None:
    """The file of the repository that a link of a page leads to; None if it is no such link."""
    if "://" in match["path"]:
        return None
    target = normpath(PurePosixPath(path).parent / match["path"])
    if (ROOT / target).is_dir():
        target += "/README.md"
    return target if (ROOT / target).is_file() else None


def _uri(path: str) -> str:
    """The place in the site of a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == FIRST:
        return "index.md"
    return path if path.endswith(".md") else f"{path}.md"
