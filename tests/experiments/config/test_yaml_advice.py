"""What is said about lines that are not YAML."""

import pytest

from fish_tuning.experiments.config.yaml_file import parse_yaml
from fish_tuning.experiments.errors import ConfigError

TABS = "has a tab where YAML takes only spaces; replace it with spaces"
INDENTED = "is not indented like the lines above it; give keys of one section the same number"
DEEPER = "which already has a value; give keys of one section the same number of spaces"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a:\n\tb: 1\n", 2, TABS),
        ("a:\n  b: 1\n\tc: 2\n", 3, TABS),
        ("a:\tb\n", 1, TABS),
        ("a:\n    b: 1\n  c: 2\n", 3, INDENTED),
        ("a:\n  b: 1\n c: 2\n", 3, INDENTED),
        ("- a\nb: 1\n", 2, INDENTED),
        ("a:\n  b: 1\n   c: 2\n", 3, f"is indented more than line 2, {DEEPER}"),
        ("a: 1\n\n  b: 2\n", 3, f"is indented more than line 1, {DEEPER}"),
        ("a:\n- 1\n  b: 2\n", 3, f"is indented more than line 2, {DEEPER}"),
        ("a: b: c\n", 1, "has a second colon; put the value in quotes"),
        ("k" * 2000 + "model: b\n", 1, "has a colon where no key can end; put the value in quotes"),
        ("key\nother: 1\n", 2, "follows a key without a colon.* write line 1 as key: value"),
        ("a:1\nb: 2\n", 2, "follows a key without a colon.* write line 1 as key: value"),
        ("x: 0\na: [1, 2\nb: 3\n", 3, r"the bracket that opens in line 2 lacks its \]; add it"),
        ("a: {x: 1\nb: 2\n", 2, "the bracket that opens in line 1 lacks its }; add it"),
        ("a: 'text\nb: 2\n", 3, "the quotation mark that opens in line 1 is not closed; add"),
        ('a: "C:\\q"\n', 1, "has a backslash in double quotes; use single quotes"),
        ("a: @b\n", 1, "has a value that starts with @; put it in quotes"),
        ("a: 'b' c\n", 1, "has text after a closing quotation mark; put all of it in quotes"),
        ("a: *b\n", 1, "found undefined alias 'b'"),
    ],
)
def test_advice(text, line, message):
    """Guards the line and the way out against the parser's jargon."""
    with pytest.raises(ConfigError, match=rf"^x\.yaml, line {line}: {message}"):
        parse_yaml(text, "x.yaml")
