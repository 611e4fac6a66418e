"""Chats: lists of messages, as different data sets write them."""

from __future__ import annotations

import contextlib
import json
from typing import Any

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
}
"""The roles of messages, with the usual name of each."""


def chat_of(value: Any) -> list[dict[str, str]]:
    """Return a chat as messages with `role` and `content`; also read `from` and `value`.

    Args:
        value: A list of messages, or its JSON, as files without nested columns hold it.

    Raises:
        ValueError: It is not a chat.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{_short(value)} is not a list of messages with role and content")
    return [_message(entry, number) for number, entry in enumerate(value, start=1)]


def prompt_and_answer(messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], str]:
    """Divide a chat at its last message of the assistant: what comes before, and its content."""
    last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:last], messages[last]["content"]


def check_chat(messages: list[dict[str, str]]) -> None:
    """Check that there is something to learn from a chat.

    Raises:
        ValueError: It has no message of the assistant.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message is the assistant's, so there is nothing to learn")


def _message(entry: Any, number: int) -> dict[str, str]:
    if not isinstance(entry, dict):
        raise ValueError(f"message {number} is {_short(entry)}, not a role and a content")
    # Columns have all fields in all rows: those that a message lacks are None.
    role = entry.get("role") or entry.get("from")
    content = entry.get("content")
    content = entry.get("value") if content is None else content
    if role not in ROLES:
        raise ValueError(
            f"message {number} has the role {role!r}; known are {', '.join(dict.fromkeys(ROLES))}"
        )
    if entry.get("tool_calls"):
        raise ValueError(
            f"message {number} calls tools, which templates write from a field of its own; write "
            "the calls into its content, or remove the row"
        )
    if not isinstance(content, str):
        raise ValueError(f"message {number} has the content {_short(content)}, which is not text")
    return {"role": ROLES[role], "content": content}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
