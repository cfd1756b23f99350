"""Small text files beside the weights, read whole, up to a limit."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from merge_kit.errors import CheckpointError

_MAX_CONFIG_BYTES = 8 << 20


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Return a file's content.

    Raises:
        CheckpointError: If it cannot be read, is no regular file, or is larger than `max_bytes`.
    """
    try:
        # Not blocking: a pipe of this name must be refused, not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError("is no regular file", where=str(path), hint="replace it")
            if status.st_size > max_bytes:
                problem = f"holds {status.st_size} bytes, expected at most {max_bytes}"
                raise CheckpointError(problem, where=str(path), hint="is it the right file?")
            return file.read(status.st_size)  # a larger number would be allocated
    except OSError as exc:
        problem = f"cannot read: {exc.strerror}"
        raise CheckpointError(problem, where=str(path), hint="check path and permissions") from exc


def read_config(path: Path) -> str:
    """Return the text of a config file.

    Raises:
        CheckpointError: If it cannot be read or is not UTF-8.
    """
    try:
        return read_bytes(path, _MAX_CONFIG_BYTES).decode("utf-8")
    except UnicodeDecodeError as exc:
        problem = f"is not UTF-8, at byte {exc.start}"
        raise CheckpointError(problem, where=str(path), hint="save it as UTF-8") from exc
