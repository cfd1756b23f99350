"""JSON as text: where its values stand, and edits that leave every other character alone."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Member:
    """One member of an object, as positions in the text (starts included, stops not).

    Attributes:
        gap_start: After the `{` or the comma before it.
        key_start: At the key's opening quote.
        key_stop: After its closing quote.
        start: At the value's first character.
        stop: After its last.
    """

    key: str
    gap_start: int
    key_start: int
    key_stop: int
    start: int
    stop: int


def skip(text: str, at: int) -> int:
    """Return the first position from `at` on that is no white space."""
    match = _SPACE.match(text, at)
    return match.end() if match else at


def members(text: str, start: int) -> list[Member]:
    """Return the members of the object whose `{` is at `start`; the text must be valid JSON."""
    found: list[Member] = []
    gap_start = start + 1
    key_start = skip(text, gap_start)
    while text[key_start] == '"':
        key, key_stop = _DECODER.raw_decode(text, key_start)
        value_start = skip(text, skip(text, key_stop) + 1)
        stop = _DECODER.raw_decode(text, value_start)[1]
        found.append(Member(key, gap_start, key_start, key_stop, value_start, stop))
        comma = skip(text, stop)
        if text[comma] != ",":
            break
        gap_start = comma + 1
        key_start = skip(text, gap_start)
    return found


def replaced(text: str, member: Member, value: Any) -> str:
    """Return the text with another value for a member."""
    old = text[member.start : member.stop]
    one_line = old[0] in "[{" and "\n" not in old and old[1:-1].strip()
    indent = None if one_line else _line_indent(text, member.key_start)
    return text[: member.start] + rendered(text, value, indent) + text[member.stop :]


def inserted(text: str, start: int, key: str, value: Any) -> str:
    """Return the text with a new last member of the object at `start`, in its siblings' format."""
    found = members(text, start)
    if not found:
        return _first(text, start, key, value)
    last = found[-1]
    gap, colon = text[last.gap_start : last.key_start], text[last.key_stop : last.start]
    if len(found) == 1 and not gap and colon != ":":
        gap = " "  # {"a": 1} says nothing of the space after a comma; the colon's is the best guess
    indent = gap.rpartition("\n")[2] if "\n" in gap else None
    member = gap + json.dumps(key) + colon + rendered(text, value, indent)
    return f"{text[: last.stop]},{member}{text[last.stop :]}"


def removed(text: str, start: int, key: str) -> str:
    """Return the text without a member of the object at `start`, and without one comma."""
    found = members(text, start)
    place = [member.key for member in found].index(key)
    if len(found) == 1:
        cut_from, cut_to = start + 1, text.index("}", found[0].stop)
    elif place + 1 < len(found):
        cut_from, cut_to = found[place].key_start, found[place + 1].key_start
    else:
        cut_from, cut_to = found[place - 1].stop, found[place].stop
    return text[:cut_from] + text[cut_to:]


def rendered(text: str, value: Any, indent: str | None) -> str:
    """Return a value as JSON in the style of the text.

    Args:
        text: The whole file, which shows indentation, line ends and separators.
        value: Any JSON value; NaN and infinities are refused.
        indent: Indentation of the line that the value starts on, or None for one line.
    """
    spaced, unit = _style(text)
    if indent is None or unit is None or not isinstance(value, list | tuple | dict):
        separators: Sequence[str] = (", ", ": ") if spaced else (",", ":")
        return json.dumps(value, allow_nan=False, separators=(separators[0], separators[1]))
    separators = (",", ": " if spaced else ":")
    plain = json.dumps(
        value, allow_nan=False, indent=unit, separators=(separators[0], separators[1])
    )
    return plain.replace("\n", _newline(text) + indent)


def _first(text: str, start: int, key: str, value: Any) -> str:
    """Return the text with the first member of an object that had none."""
    spaced, unit = _style(text)
    close = skip(text, start + 1)
    colon = ": " if spaced else ":"
    if unit is None:
        member = json.dumps(key) + colon + rendered(text, value, None)
        return text[: start + 1] + member + text[start + 1 :]
    outer = _line_indent(text, start)
    inner = outer + unit
    member = f"{_newline(text)}{inner}{json.dumps(key)}{colon}{rendered(text, value, inner)}"
    tail = "" if "\n" in text[start + 1 : close] else _newline(text) + outer
    return text[: start + 1] + member + tail + text[start + 1 :]


def _style(text: str) -> tuple[bool, str | None]:
    """Return whether a space follows colons, and the indentation of a level (None: one line)."""
    found = members(text, skip(text, 0))
    if not found:
        return True, None
    gap = text[found[0].gap_start : found[0].key_start]
    spaced = text[found[0].key_stop : found[0].start] != ":"
    return spaced, gap.rpartition("\n")[2] if "\n" in gap else None


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _line_indent(text: str, at: int) -> str:
    """Return the white space at the start of the line that holds a position."""
    start = text.rfind("\n", 0, at) + 1
    return text[start : skip(text, start)] if start else ""
