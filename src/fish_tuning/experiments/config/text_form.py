"""Which columns hold the texts that a language model learns from, and in which form."""

from __future__ import annotations

from collections.abc import Iterator
from string import Formatter
from typing import Annotated

from pydantic import AfterValidator, Field

from fish_tuning.experiments.config.sections import Section
from fish_tuning.experiments.config.values import Name, Names, Text


def template_columns(template: str) -> list[str]:
    """Return the names of the columns that a template has in braces.

    Raises:
        ValueError: It has none, or its braces do not match.
    """
    try:
        columns = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"{template!r}: {error}; double braces that are text: {{{{") from None
    if not columns or not all(columns):
        raise ValueError(f"{template!r} names no column; write one in braces, such as {{question}}")
    return columns


def _template(value: str) -> str:
    template_columns(value)
    return value


Template = Annotated[Text, AfterValidator(_template)]


class TextForm(Section):
    """The form of the texts that a language model learns from."""

    text_column: Names | None = Field(
        default=None,
        description="The text column, or a list of two for sentence pairs; by default those of the "
        "task, or those whose type is text.",
    )
    prompt_column: Name | None = Field(
        default=None,
        description="Language models: the column with what is given. By default, usual pairs are "
        "found by name: prompt and completion; instruction (with input) and output; question and "
        "answer; query and response.",
    )
    completion_column: Name | None = Field(
        default=None,
        description="Language models: the column with what is to be learned. A line break is put "
        "between the two columns unless they are named prompt and completion, which are joined as "
        "they are.",
    )
    prompt_template: Template | None = Field(
        default=None,
        description='Language models: the prompt, with columns in braces, such as "Question: '
        '{question}\\nAnswer:". Values are put in without white space around them.',
    )
    completion_template: Template | None = Field(
        default=None,
        description='Language models: the completion in the same way, such as " {answer}". Prompt '
        "and completion are joined as they are.",
    )
    messages_column: Name | None = Field(
        default=None,
        description="Language models: the column with chats, as lists of messages with role and "
        "content (or from and value); by default messages, conversations or conversation.",
    )
    apply_chat_template: bool = Field(
        default=False,
        description="Language models: turn prompt and completion into a chat of a user and an "
        "assistant, with the model's chat template.",
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Several forms at once, and halves of pairs."""
        yield from super().conflicts()
        for kind in ("column", "template"):
            pair = (f"prompt_{kind}", f"completion_{kind}")
            given = [key for key in pair if getattr(self, key) is not None]
            if len(given) == 1:
                missing = next(key for key in pair if key not in given)
                yield missing, f"is not given beside {given[0]}; give both"
        forms = [
            key
            for key in ("text_column", "prompt_column", "prompt_template", "messages_column")
            if getattr(self, key) is not None
        ]
        if len(forms) > 1:
            yield forms[-1], f"is given beside {' and '.join(forms[:-1])}; keep one form"
        if self.apply_chat_template and forms and forms[0] in ("text_column", "messages_column"):
            yield (
                "apply_chat_template",
                f"is for prompts and completions, not {forms[0]}; remove it",
            )

    @property
    def own_keys(self) -> list[str]:
        """The given keys that only language models have."""
        return [
            name
            for name in TextForm.model_fields
            if name != "text_column" and getattr(self, name) not in (None, False)
        ]
