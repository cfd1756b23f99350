"""Where an output may go: never over, into or around an input, and over nothing by accident."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from merge_kit.errors import OutputError, OutputExistsError, UsageError

Inode = tuple[int, int]
_ELSEWHERE = "choose another folder with -o"


def real_place(output: Path) -> Path:
    """Return the path that an output means, links followed; it need not be there.

    Raises:
        UsageError: If no file can have that name.
        OutputError: If links lead in a circle, or the place cannot be replaced as a whole.
    """
    if "\0" in str(output):
        raise UsageError(f"{str(output)!r} is no path", hint=_ELSEWHERE)
    real = Path(os.path.realpath(output))
    if real.is_symlink():
        raise OutputError("is a link that leads nowhere", where=str(output), hint=_ELSEWHERE)
    if real.is_mount():
        problem = "is the root of a file system, expected a folder that can be renamed"
        raise OutputError(problem, where=str(output), hint="name a folder inside it with -o")
    return real


def refuse_reserved(place: Path, where: str) -> None:
    """Refuse a name that the work of another output has: it would be taken for that, and deleted.

    Raises:
        OutputExistsError: If the name is one of those.
    """
    if place.name.endswith((".partial", ".partial.lock", ".partial.state", ".partial.replaced")):
        problem = "has the name of an unfinished output"
        raise OutputExistsError(problem, where=where, hint="choose a name without .partial")


def refuse_inputs(place: Path, inputs: Sequence[Path], where: str) -> None:
    """Refuse a place that is an input, lies inside one, or holds one or what one links to.

    Files are told apart by their inodes, so that no link and no other spelling gets around this.

    Raises:
        OutputExistsError: If the place is refused.
    """
    own, above = _inode(place), set(_inodes(place))
    for path in inputs:
        found = _inode(path)
        if found is not None and found == own:
            raise _refused(f"is the input {path}", where)
        if found in above:
            raise _refused(f"lies inside the input {path}", where)
        held = own is not None and any(own in set(_inodes(p)) for p in (path, *_linked(path)))
        if held:
            raise _refused(f"holds the input {path}, or files that it links to", where)


def _refused(problem: str, where: str) -> OutputExistsError:
    return OutputExistsError(
        f"{problem}, and inputs are never touched", where=where, hint=_ELSEWHERE
    )


def _inode(path: Path) -> Inode | None:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def _inodes(path: Path) -> Iterator[Inode]:
    """Yield the inodes of a path and of the folders above it, as far as they are there."""
    real = Path(os.path.realpath(path))
    found = (_inode(p) for p in (real, *real.parents))
    yield from (inode for inode in found if inode is not None)


def _linked(root: Path) -> Iterator[Path]:
    """Yield the links in a folder; the Hub's cache, for one, keeps its files elsewhere."""
    for folder, folders, files in os.walk(root):
        paths = (Path(folder, name) for name in (*folders, *files))
        yield from (path for path in paths if path.is_symlink())


def refuse_existing(place: Path, where: str, *, overwrite: bool) -> None:
    """Refuse a place that is taken: a file, or a folder with something in it.

    Args:
        where: The output as the user named it.
        overwrite: Whether the folder may be replaced; a folder that holds the working directory
            or the home directory may not.

    Raises:
        OutputExistsError: If the folder is not to be replaced.
        OutputError: If it is a file, or cannot be replaced.
    """
    if not os.path.lexists(place):
        return
    if not place.is_dir():
        problem = "is a file, expected a folder or nothing"
        raise OutputError(problem, where=where, hint=_ELSEWHERE)
    if is_empty(place):
        return
    if not overwrite:
        hint = "replace it with --overwrite, or choose another folder with -o"
        raise OutputExistsError("is there already and is not empty", where=where, hint=hint)
    own = _inode(place)
    for kept, what in ((Path.cwd(), "working"), (Path("~").expanduser(), "home")):
        if own in set(_inodes(kept)):
            problem = f"is or holds the {what} directory, which --overwrite would delete"
            raise OutputExistsError(problem, where=where, hint=_ELSEWHERE)
    if not os.access(place, os.W_OK | os.X_OK):
        problem = "cannot be replaced: it is read-only"
        raise OutputError(problem, where=where, hint=_ELSEWHERE)


def is_empty(folder: Path) -> bool:
    """Return whether a folder holds nothing at all."""
    with os.scandir(folder) as entries:
        return next(entries, None) is None


def make_folders(folder: Path) -> list[Path]:
    """Create a folder and those above it; return what was not there, the outermost first."""
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    made = list(reversed(missing))
    try:
        for path in made:
            path.mkdir(exist_ok=True)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    except OSError:
        remove_empty(made)
        raise
    return made


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, the innermost first, up to one that is not there or holds something."""
    for path in reversed(folders):
        if not path.is_dir() or not is_empty(path):
            return
        path.rmdir()
