"""Chats: lists of messages, as different data sets write them."""

from __future__ import annotations

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

    Raises:
        ValueError: It is not a chat.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{_short(value)} is not a list of messages with role and content")
    return [_message(entry, number) for number, entry in enumerate(value, start=1)]


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
    role = entry.get("role", entry.get("from"))
    content = entry.get("content", entry.get("value"))
    if role not in ROLES:
        raise ValueError(
            f"message {number} has the role {role!r}; known are {', '.join(dict.fromkeys(ROLES))}"
        )
    if not isinstance(content, str):
        raise ValueError(f"message {number} has the content {_short(content)}, which is not text")
    return {"role": ROLES[role], "content": content}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
