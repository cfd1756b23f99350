"""One run at a time works on an output: a lock that ends with its process."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from merge_kit.errors import LockedError
from merge_kit.publish.failures import writing


class Lock:
    """A locked file with the process's number in it.

    The file lies beside the partial folder, not in it: the lock must still hold while that folder
    is renamed, and nothing of it may come along.

    Args:
        path: The file; it is removed in the end.
        where: The output as the user named it.
    """

    def __init__(self, path: Path, where: str) -> None:
        self._path, self._where = path, where

    def __enter__(self) -> Self:
        with writing(self._path):
            self._descriptor = self._acquire()
            try:
                os.ftruncate(self._descriptor, 0)
                os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
            except OSError:
                self._path.unlink(missing_ok=True)
                os.close(self._descriptor)
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with writing(self._path):
                self._path.unlink(missing_ok=True)
        finally:
            os.close(self._descriptor)

    def _acquire(self) -> int:
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(self._path, flags, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_there(descriptor):
                    return descriptor
            except BlockingIOError as exc:
                raise self._locked(descriptor) from exc
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its owner removed it between our two calls

    def _is_there(self, descriptor: int) -> bool:
        try:
            named = self._path.lstat()
        except FileNotFoundError:
            return False
        return os.path.samestat(named, os.fstat(descriptor))

    def _locked(self, descriptor: int) -> LockedError:
        try:
            number = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
        finally:
            os.close(descriptor)
        who = f"process {number}" if number.isdigit() else "another process"
        return LockedError(
            f"is locked by {who}, which is writing it",
            where=self._where,
            hint="wait for it to end, or choose another folder with -o",
        )
