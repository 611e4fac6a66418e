"""Model cards as PEFT and Trainers write them: what was not filled in is left out."""

import re
from collections.abc import Iterable

from huggingface_hub import ModelCard, ModelCardData

_BLANK_LINE = re.compile(
    r"(- \*\*[^*]*\*\* *)?\[More Information Needed\]( *<!--.*-->)?|More information needed"
)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_TEMPLATE_TITLE = "# Model Card for Model ID"


def without_blanks(text: str, title: str) -> str:
    """Leave out the parts of a card that nobody has filled in.

    Args:
        text: The card without its metadata.
        title: Takes the place of the template's title.

    Returns:
        The text without placeholders, without sections that are those of the hub's template, and
        without headings that have nothing below them.
    """
    if not any(_BLANK_LINE.fullmatch(line.strip()) for line in text.splitlines()):
        return text
    sections = _sections(text)
    if _TEMPLATE_TITLE in text:
        # The template, rendered without any information.
        template = ModelCard.from_template(ModelCardData()).text
        known = {_words(s) for s in _sections(template) if not s.startswith(_TEMPLATE_TITLE)}
        sections = [s for s in sections if _words(s) not in known or not _body(s)]
    kept: list[str] = []
    below = 0  # the level of the heading that follows
    for section in reversed(sections):
        level = len(section) - len(section.lstrip("#"))
        if level > 1 and below <= level and not _body(section):
            continue
        if section.startswith(_TEMPLATE_TITLE):
            section = f"# {title}\n\n{_body(section)}"
        kept.append(section)
        # PEFT appends its versions to whatever section comes last.
        below = 0 if section.startswith("### Framework versions") else level or below
    return "\n\n".join(section.strip() for section in reversed(kept)) + "\n"


def _sections(text: str) -> list[str]:
    """Split at headings, outside of code. Placeholders are left out."""
    sections: list[list[str]] = [[]]
    in_code = False
    for line in text.splitlines():
        in_code ^= line.lstrip().startswith("```")
        if not in_code and re.match(r"#{1,6} ", line):
            sections.append([])
        if in_code or not _BLANK_LINE.fullmatch(line.strip()):
            sections[-1].append(line)
    return [section for lines in sections if (section := "\n".join(lines).strip())]


def _body(section: str) -> str:
    return _COMMENT.sub("", section.partition("\n")[2]).strip()


def _words(section: str) -> str:
    return " ".join(_COMMENT.sub("", section).split())


def without_base(text: str, tags: Iterable[str], base: str) -> tuple[str, list[str]]:
    """Leave out the path of a base model on this machine, which means nothing elsewhere.

    Returns:
        The card's text, and those of its tags that stay.
    """
    link = f"[{base}](https://huggingface.co/{base})"
    kept = [tag for tag in tags if not (tag.startswith("base_model:") and tag.endswith(base))]
    return text.replace(link, "a local model"), kept
