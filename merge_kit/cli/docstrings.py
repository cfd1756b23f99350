"""A method's docstring, taken apart."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass

_TITLE = re.compile(r"([A-Z]\w*(?: \w+){0,3}):(?: (.*))?")
_ENTRY = re.compile(r"(\w+): (.*)")


@dataclass(frozen=True, slots=True)
class Docstring:
    """What a method says of itself.

    Attributes:
        summary: The first line.
        paragraphs: Formula and explanation, with their line breaks.
        attributes: Dataclass field -> its description.
        sections: "Cost", "Source" and whatever else has a title.
    """

    summary: str
    paragraphs: tuple[str, ...]
    attributes: Mapping[str, str]
    sections: Mapping[str, str]


def read_docstring(owner: type) -> Docstring:
    """Return the parts of a class's own docstring; all are empty if it has none."""
    text = inspect.cleandoc(owner.__dict__.get("__doc__") or "")
    summary, *blocks = re.split(r"\n\s*\n", text)
    paragraphs: list[str] = []
    attributes: dict[str, str] = {}
    sections: dict[str, str] = {}
    for block in blocks:
        if _TITLE.fullmatch(block.splitlines()[0]) is None:
            paragraphs.append(block)
        elif block.startswith("Attributes:"):
            attributes.update(_entries(block))
        else:
            sections.update(_titled(block))
    return Docstring(summary.replace("\n", " "), tuple(paragraphs), attributes, sections)


def _titled(block: str) -> dict[str, str]:
    """Return `Title: text` lines; indented lines go on with the text above them."""
    found: dict[str, str] = {}
    title = ""
    for line in block.splitlines():
        match = None if line.startswith(" ") else _TITLE.fullmatch(line)
        if match is not None:
            title = match[1]
            found[title] = match[2] or ""
        else:
            found[title] = f"{found[title]} {line.strip()}".strip()
    return found


def _entries(block: str) -> dict[str, str]:
    """Return `name: text` lines of one indented list, continuation lines joined."""
    found: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(block.partition("\n")[2]).splitlines():
        match = None if line.startswith(" ") else _ENTRY.fullmatch(line)
        if match is not None:
            name = match[1]
            found[name] = match[2]
        elif name:
            found[name] = f"{found[name]} {line.strip()}"
    return found
