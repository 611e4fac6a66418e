"""The error for anything that a user can fix in a config file or in the data it names."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """All the problems of an experiment's config or data, in one message.

    Args:
        problems: One sentence per problem: where it is, the value, what is allowed, what to do.
        source: The file that has the problems.
    """

    def __init__(self, problems: str | Sequence[str], source: str | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        if source is None and len(self.problems) == 1:
            text = self.problems[0]
        else:
            text = "\n  - ".join([f"{source or 'config'}: {count}", *self.problems])
        super().__init__(text)


class MissingFileError(ConfigError):
    """A file of the data does not exist, or not here."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the error's type if it has no message.

    A line that ends in a colon says where; the next one, which says what, is added to it.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
