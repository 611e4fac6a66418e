"""What is wrong with a line of YAML, and what to do, in place of the parser's own terms."""

from __future__ import annotations

import re

import yaml


def advice(error: yaml.MarkedYAMLError, text: str) -> str:
    """Explain a parser's error about a text."""
    problem = error.problem or error.context or "is not YAML"
    opened = f"line {error.context_mark.line + 1}" if error.context_mark else "a line above"
    for pattern, explanation in (
        (r"character '\\t'", "has a tab where YAML takes only spaces; replace it with spaces"),
        (
            r"character '(.)' that cannot start",
            r"has a value that starts with \1; put it in quotes",
        ),
        (r"expected ',' or '([\]}])'", rf"the bracket that opens in {opened} lacks its \1; add it"),
        (
            "unexpected end of stream",
            f"the quotation mark that opens in {opened} is not closed; add the second one",
        ),
        ("unknown escape", "has a backslash in double quotes; use single quotes"),
        (r"found '<scalar>'", "has text after a closing quotation mark; put all of it in quotes"),
        (
            r"found '(<block mapping start>|<block sequence start>|\?|-)'",
            "is not indented like the lines above it; give keys of one section the same number of "
            "spaces",
        ),
    ):
        if match := re.search(pattern, problem):
            return match.expand(explanation)
    if error.problem_mark and "mapping values are not allowed" in problem:
        return _misplaced_colon(text.splitlines(), error.problem_mark)
    return problem


def _misplaced_colon(lines: list[str], mark: yaml.Mark) -> str:
    """Why a colon is not expected: a second one, a key too long, or a line of no section."""
    if re.search(r":\s", lines[mark.line][: mark.column]):
        return "has a second colon; put the value in quotes"
    above_it = [
        (n + 1, line.strip())
        for n, line in enumerate(lines[: mark.line])
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not above_it:  # A key of more than 1,024 characters.
        return "has a colon where no key can end; put the value in quotes"
    number, above = above_it[-1]
    if not above.startswith("- ") and not re.search(r":(\s|$)", above):
        return f"follows a key without a colon and a space; write line {number} as key: value"
    return (
        f"is indented more than line {number}, which already has a value; give keys of one section "
        "the same number of spaces"
    )
