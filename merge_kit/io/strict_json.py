"""JSON from files that nobody vouches for: UTF-8, no duplicate keys, no NaN, bounded depth."""

from __future__ import annotations

import json
import re
from reprlib import Repr
from typing import Any, NoReturn

from merge_kit.errors import CheckpointError

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_short = Repr()
_short.maxstring = _short.maxother = 120


def shown(value: object) -> str:
    """Return a value for a message: escaped, and of bounded length whatever a file holds."""
    return _short.repr(value)


def is_printable(name: str) -> bool:
    """Return whether a name is free of control characters and of halves of UTF-16 pairs."""
    return _UNPRINTABLE.search(name) is None


def is_unicode(text: str) -> bool:
    r"""Return whether text can be written as UTF-8; an escape like `\ud800` alone cannot."""
    return _SURROGATE.search(text) is None


def parse_object(raw: bytes, *, where: str, what: str) -> dict[str, Any]:
    """Return the JSON object that `raw` holds.

    Args:
        where: The file, for messages.
        what: What the file calls this text, "header" or "index".

    Raises:
        CheckpointError: If it is anything else, or JSON that two readers understand differently.
    """
    try:
        text = raw.decode("utf-8")
        # `-0` is an integer to Python and a float to others; look closer only where one may be.
        parse_int = _integer if b"-0" in raw else None
        found = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_constant, parse_int=parse_int
        )
    except UnicodeDecodeError as exc:
        problem = f"{what} is not UTF-8, at its byte {exc.start}"
        raise CheckpointError(problem, where=where, hint=_HINT) from exc
    except RecursionError as exc:
        problem = f"{what} is nested too deeply, expected at most three levels"
        raise CheckpointError(problem, where=where, hint=_HINT) from exc
    except ValueError as exc:
        problem = f"{what} is not valid JSON: {exc}"
        raise CheckpointError(problem, where=where, hint=_HINT) from exc
    if not isinstance(found, dict):
        problem = f"{what} holds a JSON {type(found).__name__}, expected an object"
        raise CheckpointError(problem, where=where, hint=_HINT)
    return found


_HINT = "the file is damaged or no checkpoint; fetch or save it again"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    seen: set[str] = set()
    twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    raise ValueError(f"key {shown(twice)} appears twice")


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _integer(digits: str) -> int:
    if digits == "-0":
        raise ValueError("-0 is no integer")
    return int(digits)
