"""What the system refuses while an output is written, in the words of this package."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from merge_kit.errors import CheckpointError, OutputError

_FULL = "free some space and run again: it goes on where it stopped"
_CLOSED = "choose a place that you may write to with -o"
_HINTS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EACCES: _CLOSED,
    errno.EPERM: _CLOSED,
    errno.EROFS: _CLOSED,
    errno.ENOTDIR: "a part of the path is a file; choose another place with -o",
    errno.EEXIST: "a part of the path is a file; choose another place with -o",
    errno.ENAMETOOLONG: "choose a shorter name with -o",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into an OutputError that names the path."""
    try:
        yield
    except OSError as exc:
        hint = _HINTS.get(exc.errno or 0, "check the disk and run again")
        problem = f"cannot write: {exc.strerror or exc}"
        raise OutputError(problem, where=path.name, hint=hint) from exc


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError into a CheckpointError that names the path."""
    try:
        yield
    except OSError as exc:
        problem = f"cannot read: {exc.strerror or exc}"
        raise CheckpointError(problem, where=path.name, hint="check path and permissions") from exc
