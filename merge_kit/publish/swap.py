"""Folders put in the place of others, and on the disk."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from merge_kit.publish.places import is_empty

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NOT_SUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


def put_in_place(folder: Path, place: Path, replaced: Path) -> None:
    """Give a folder the name `place`; what was there, if anything, becomes `replaced`.

    Where the system can exchange two names, `place` is never missing, not even for a moment.
    """
    if not os.path.lexists(place) or is_empty(place):
        folder.rename(place)
    elif exchange(folder, place):
        folder.rename(replaced)
    else:
        place.rename(replaced)
        try:
            folder.rename(place)
        except OSError:
            replaced.rename(place)
            raise


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step, or return False where the system cannot."""
    renameat2 = _renameat2()
    if renameat2 is None:
        return False
    code = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    if code == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_SUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _renameat2() -> Callable[..., int] | None:
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        texts, numbers = ctypes.c_char_p, ctypes.c_int
        function.argtypes = [numbers, texts, numbers, texts, ctypes.c_uint]
    return function


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_tree(folder: Path) -> None:
    """Wait until everything in a folder is on disk, the innermost first."""
    for inner, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(inner, name))
        sync(Path(inner))


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
