"""Names: the nearest valid one, and shell-style patterns over tensor names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import translate
from functools import lru_cache

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
"""What may be a model of the Hub, or the name of a folder: it means the same on every machine."""

_MOST = 40
_MOST_LETTERS = 200


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint such as `did you mean 'weight'?`, or the valid names, of many the first."""
    names = sorted(valid)
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    listed = [name[:_MOST_LETTERS] for name in names[:_MOST]]
    more = f" and {len(names) - _MOST:,} more" if len(names) > _MOST else ""
    return "valid: " + ", ".join(listed) + more if names else ""


@lru_cache(maxsize=4096)
def _pattern(glob: str) -> re.Pattern[str]:
    return re.compile(translate(glob))


def glob_matches(glob: str, name: str) -> bool:
    """Return whether a case-sensitive glob matches the whole name; `*` also crosses dots."""
    return _pattern(glob).match(name) is not None


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key under which `layers.2` comes before `layers.10`."""
    parts = re.split(r"(\d+)", name)
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts)
