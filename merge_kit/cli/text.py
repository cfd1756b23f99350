"""Tables and JSON on standard output."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from merge_kit.plan.describe import Row

WIDTH = 80


def table(rows: Sequence[Row], width: int = WIDTH) -> str:
    """Return rows in two columns, texts wrapped to the width; words are never cut."""
    indent = max((len(row.label) for row in rows), default=0) + 2
    return "\n".join(_wrapped(row, indent, width) for row in rows)


def _wrapped(row: Row, indent: int, width: int) -> str:
    lines = textwrap.wrap(
        row.text,
        width,
        initial_indent=row.label.ljust(indent),
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines) if lines else row.label


def paragraph_of(text: str, width: int = WIDTH) -> str:
    """Return a paragraph that fits the width: prose is refilled, lines that fit stay."""
    lines = text.splitlines()
    if all(len(line) <= width for line in lines):
        return text
    if " = " not in lines[0]:
        return textwrap.fill(" ".join(lines), width, break_long_words=False)
    return "\n".join(textwrap.fill(line, width, subsequent_indent="    ") for line in lines)


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells with each column as wide as its widest cell, the last one free."""
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return "\n".join(line.rstrip() for line in padded)


def print_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print a value as indented JSON, the same text for the same value."""
    print(_json(value, indent=2))


def print_json_line(value: Mapping[str, Any]) -> None:
    """Print a value as one line of JSON that a reader sees at once."""
    print(_json(value), flush=True)


def _json(value: object, indent: int | None = None) -> str:
    """Return JSON; escaped where standard output cannot take every character of it."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent, ensure_ascii=True, allow_nan=False)
    return text
