"""The files beside the weights, written into the output; and the files that an output has."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from merge_kit.errors import CheckpointError, OutputError
from merge_kit.plan.values import SideFile
from merge_kit.publish.failures import reading, writing
from merge_kit.publish.staging import STATE

_PIECE_BYTES = 1 << 20


def write_side_files(folder: Path, files: Sequence[SideFile]) -> None:
    """Copy or write files into a folder, in place of what stands there under their names.

    Raises:
        CheckpointError: If a file cannot be read, or its name leads out of the folder.
        OutputError: If the system refuses a write.
    """
    for file in files:
        target = _target(folder, file.name)
        with writing(target):
            target.unlink(missing_ok=True)  # a link or a second name must not be written through
            if file.text is not None:
                with target.open("xb") as out:
                    out.write(file.text.encode("utf-8"))
            elif file.source is not None:
                _copy(file.source, target)


def is_inside(name: str) -> bool:
    """Return whether a name, with forward slashes, stays in the folder that it is put into."""
    parts = name.split("/")
    return not any(part in ("", ".", "..") for part in parts) and "\0" not in name


def _target(folder: Path, name: str) -> Path:
    """Return the path of a file, its folders made; nothing on the way is a link."""
    if not is_inside(name) or name.split("/", 1)[0] == STATE:
        problem = f"the name {name[:100]!r} does not stay in the output, or is reserved"
        raise CheckpointError(problem, hint="rename the file in the input")
    at = folder
    for part in name.split("/")[:-1]:
        at /= part
        if at.is_symlink():
            problem = f"{part!r} is a link, expected a folder"
            raise OutputError(problem, where=at.name, hint="remove it and run again")
        with writing(at):
            at.mkdir(exist_ok=True)
    return at / name.rpartition("/")[2]


def _copy(source: Path, target: Path) -> None:
    with _regular(source) as file, target.open("xb") as out:
        while True:
            with reading(source):
                piece = file.read(_PIECE_BYTES)
            if not piece:
                return
            out.write(piece)


@contextmanager
def _regular(path: Path) -> Iterator[BinaryIO]:
    with reading(path):
        # Not blocking: a pipe of this name must be refused, not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError("is no regular file", where=path.name, hint="replace it")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def file_list(folder: Path) -> list[str]:
    """Return the files that a push sends, relative with forward slashes, sorted.

    Left out is whatever is hidden or inside something hidden, and links: only what was written
    here is sent.

    Raises:
        CheckpointError: If the folder cannot be read.
    """
    found = []
    with reading(folder):
        for inner, folders, names in os.walk(folder, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            paths = (Path(inner, name) for name in names if not name.startswith("."))
            found += [path for path in paths if stat.S_ISREG(path.lstat().st_mode)]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _raise(error: OSError) -> None:
    raise error
