"""Errors as messages: `error: where: problem`, then hints."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from merge_kit.errors import MergeKitError, OutputError, Problems

_FULL = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than the system allows",
}


def message(error: MergeKitError) -> str:
    """Return the lines for a terminal; several problems are numbered."""
    found = list(_flat(error))
    if len(found) == 1:
        return f"error: {_described(found[0], '  ')}"
    numbered = (f"  {i}. {_described(each, '     ')}" for i, each in enumerate(found, start=1))
    return "\n".join([f"error: {len(found)} problems", *numbered])


def system_error(exc: Exception) -> MergeKitError | None:
    """Return a lack of memory or disk as our error, None if it is neither."""
    if isinstance(exc, MemoryError):
        hint = "set a lower --memory or fewer --threads"
        return OutputError("the system refused more memory", hint=hint)
    if isinstance(exc, OSError) and exc.errno in _FULL:
        hint = "make room and run the same command again"
        return OutputError(_FULL[exc.errno], where=str(exc.filename or ""), hint=hint)
    return None


def _flat(error: MergeKitError) -> Iterator[MergeKitError]:
    if isinstance(error, Problems):
        for each in error.errors:
            yield from _flat(each)
    else:
        yield error


def _described(error: MergeKitError, indent: str) -> str:
    line = f"{error.where}: {error.problem}" if error.where else error.problem
    hints = [f"hint: {hint}" for hint in error.hint.splitlines()]
    return f"\n{indent}".join([*line.splitlines(), *hints])
