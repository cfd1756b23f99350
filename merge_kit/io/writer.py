"""Positioned writes into files of planned size, and copies that the kernel makes."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from merge_kit.errors import OutputError

_PIECE = 8 << 20
_NO_KERNEL_COPY = {
    errno.EXDEV,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EINVAL,
    errno.EPERM,
    errno.EBADF,
    errno.ETXTBSY,
}
_NO_ALLOCATION = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


def _failed(path: Path, exc: OSError) -> OutputError:
    hint = {
        errno.ENOSPC: "free some space and run again: it goes on where it stopped",
        errno.EDQUOT: "free some space and run again: it goes on where it stopped",
        errno.EMFILE: "raise the limit of open files (ulimit -n), or set a larger shard_size",
        errno.EFBIG: "the file system or a limit forbids files of this size; set shard_size",
    }.get(exc.errno or 0, "check the disk and run again: it goes on where it stopped")
    return OutputError(f"cannot write: {exc.strerror}", where=path.name, hint=hint)


class Writer:
    """The output's files, shared by all workers; each is allocated to its full size at once.

    Args:
        kernel_copy: Whether to try copy_file_range; without it, or where the system has none,
            bytes go through a buffer.
    """

    def __init__(self, *, kernel_copy: bool = True) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._kernel_copy = kernel_copy and hasattr(os, "copy_file_range")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files.

        Raises:
            OutputError: If the system reports a write that failed late.
        """
        while self._open:
            path, descriptor = self._open.popitem()
            try:
                os.close(descriptor)
            except OSError as exc:
                raise _failed(path, exc) from exc

    def create(self, path: Path, nbytes: int, header: bytes = b"") -> None:
        """Open or create a file of this size, keep what it holds, and write its header."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            descriptor = self._open[path] = os.open(path, flags, 0o666)
            if nbytes:
                self._allocate(descriptor, nbytes)
            os.ftruncate(descriptor, nbytes)
        except OSError as exc:
            raise _failed(path, exc) from exc
        self.write(path, 0, memoryview(header))

    def ensure(self, path: Path) -> None:
        """Create an empty file that grows as it is written, unless it is there."""
        with self._lock:
            if path not in self._open:
                self.create(path, 0)

    @staticmethod
    def _allocate(descriptor: int, nbytes: int) -> None:
        if not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
        except OSError as exc:
            if exc.errno not in _NO_ALLOCATION:
                raise

    def write(self, path: Path, start: int, content: memoryview) -> None:
        """Write all of content at byte `start`.

        Raises:
            OutputError: If the system refuses.
        """
        descriptor, done = self._open[path], 0
        while done < len(content):
            try:
                done += os.pwrite(descriptor, content[done:], start + done)
            except OSError as exc:
                raise _failed(path, exc) from exc

    def read_back(self, path: Path, start: int, buffer: memoryview) -> None:
        """Fill a buffer from what was written."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._open[path], [buffer[done:]], start + done)
            except OSError as exc:
                raise _failed(path, exc) from exc
            if count == 0:
                raise OutputError("ends early", where=path.name, hint="does another program write?")
            done += count

    def copy(
        self,
        source: int,
        source_start: int,
        path: Path,
        start: int,
        count: int,
        through: Callable[[int, int], None],
    ) -> None:
        """Copy bytes of an open input file into an output file.

        Args:
            source: Descriptor of the input.
            through: Called with (offset, count) for what the kernel will not copy; it must move
                those bytes itself.
        """
        done = 0
        while done < count and self._kernel_copy:
            try:
                moved = os.copy_file_range(
                    source,
                    self._open[path],
                    min(_PIECE, count - done),
                    source_start + done,
                    start + done,
                )
            except OSError as exc:
                if exc.errno not in _NO_KERNEL_COPY:
                    raise _failed(path, exc) from exc
                self._kernel_copy = False
                break
            if moved == 0:  # the input ended early; the reader says so in its words
                break
            done += moved
        if done < count:
            through(done, count - done)

    def discard(self, path: Path) -> None:
        """Close and remove a file, if it was created."""
        descriptor = self._open.pop(path, None)
        if descriptor is not None:
            os.close(descriptor)
            path.unlink(missing_ok=True)

    def sync(self) -> None:
        """Wait until everything written is on disk."""
        for path, descriptor in self._open.items():
            try:
                os.fsync(descriptor)
            except OSError as exc:
                raise _failed(path, exc) from exc
