"""Text from users and files, made harmless in Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from merge_kit.publish.references import printable

_URL = re.compile(r"(https?://[\w./?=&%#~+:@-]*[\w/=&%#~+@-])")


def code(text: str) -> str:
    """Return text in one line as inline code, also safe in a table."""
    shown = printable(text)
    if not shown.strip() or "|" in shown or "\\" in shown:  # tables split at | even inside code
        return plain(shown)
    ticks = "`" * (_longest_run(shown) + 1)
    pad = " " if shown.startswith(("`", " ")) or shown.endswith(("`", " ")) else ""
    return f"{ticks}{pad}{shown}{pad}{ticks}"


def plain(text: str) -> str:
    """Return text in one line that is shown as it is, whatever it holds."""
    return re.sub(r"[^\w ./,;()='+-]|_", lambda found: f"&#{ord(found[0])};", printable(text))


def prose(text: str) -> str:
    """Return running text with its addresses as links, on one line."""
    pieces = _URL.split(" ".join(text.split()))
    return "".join(f"<{p}>" if i % 2 else _sentence(p) for i, p in enumerate(pieces))


def _sentence(text: str) -> str:
    """Return text with the characters escaped that mean something within a line."""
    return re.sub(r"([\\`*_\[\]<>|&~$])", r"\\\1", text)


def fence(text: str, language: str) -> list[str]:
    """Return the lines of a code block, its fence longer than any in the text."""
    ticks = "`" * max(3, _longest_run(text) + 1)
    return [f"{ticks}{language}", *text.rstrip("\n").split("\n"), ticks]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table; its cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
