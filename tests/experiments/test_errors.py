"""What is shown of errors."""

import pytest

from fish_tuning.experiments.errors import first_line


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("one\ntwo", "one"),
        (
            "error for field 'x':\n    ValueError: too small\nmore",
            "error for field 'x': ValueError: too small",
        ),
        ("", "KeyError"),
    ],
)
def test_first_line(message, shown):
    """Guards against messages whose first line only says where the problem is."""
    assert first_line(KeyError() if not message else ValueError(message)) == shown
