"""Positioned reads from files that must not change: pread, never mmap."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from merge_kit.errors import CheckpointError
from merge_kit.io.values import WeightFile

_TOO_MANY = "raise the limit of open files (ulimit -n)"


class Reader:
    """Open files of the inputs, shared by all workers.

    Args:
        files: The files as they were when the plan was made; others may be read unchecked.
    """

    def __init__(self, files: Iterable[WeightFile]) -> None:
        self._expected = {file.path: file for file in files}
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def descriptor(self, path: Path) -> int:
        """Return the open file, checked against the plan when it is opened first."""
        found = self._open.get(path)
        if found is not None:
            return found
        with self._lock:
            if path not in self._open:
                self._open[path] = self._checked(path)
            return self._open[path]

    def _checked(self, path: Path) -> int:
        """Open a file; nobody gets to read one that has changed."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            problem = f"cannot open: {exc.strerror}"
            hint = _TOO_MANY if exc.errno in {errno.EMFILE, errno.ENFILE} else "was it moved?"
            raise CheckpointError(problem, where=str(path), hint=hint) from exc
        try:
            self._check(path, descriptor)
        except CheckpointError:
            os.close(descriptor)
            raise
        return descriptor

    def _check(self, path: Path, descriptor: int) -> None:
        expected = self._expected.get(path)
        if expected is None:
            return
        now = os.fstat(descriptor)
        if (now.st_size, now.st_mtime_ns) != (expected.nbytes, expected.mtime_ns):
            raise CheckpointError(
                f"changed since the plan was made: {expected.nbytes} bytes then, {now.st_size} now",
                where=str(path),
                hint="run again when nothing writes to the inputs",
            )

    def forget(self, path: Path) -> None:
        """Close a file that will not be read again."""
        with self._lock:
            descriptor = self._open.pop(path, None)
        if descriptor is not None:
            os.close(descriptor)

    def check_all(self) -> None:
        """Check every file that was read once more.

        Raises:
            CheckpointError: If size or modification time changed while it was read.
        """
        for path, descriptor in tuple(self._open.items()):
            self._check(path, descriptor)

    def read_into(self, path: Path, start: int, buffer: memoryview) -> None:
        """Fill a buffer from byte `start` of a file.

        Raises:
            CheckpointError: If the file ends early or cannot be read.
        """
        descriptor, done = self.descriptor(path), 0
        while done < len(buffer):
            try:
                count = os.preadv(descriptor, [buffer[done:]], start + done)
            except OSError as exc:
                raise CheckpointError(
                    f"cannot read: {exc.strerror}", where=str(path), hint="check the disk"
                ) from exc
            if count == 0:
                raise CheckpointError(
                    f"ends at byte {start + done}, expected {len(buffer) - done} more",
                    where=str(path),
                    hint="it was truncated while it was read; restore it and run again",
                )
            done += count
