"""What a folder holds, down to three levels, and which of it must not be used."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from merge_kit.errors import CheckpointError
from merge_kit.io.strict_json import is_printable, shown

MAX_DEPTH = 3
RESERVED = ("README.md", "merge_kit.json")
_TRAINING = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True, slots=True)
class Listing:
    """Files of a folder, hidden ones left aside.

    Attributes:
        files: Folder relative to the root ("" for the root itself, which comes first) -> names of
            its files, sorted. Folders without files are not there.
        unusable: Path relative to the root -> why it is not to be used. Folders end in "/".
    """

    root: Path
    files: Mapping[str, tuple[str, ...]]
    unusable: Mapping[str, str]

    def path(self, relative: str) -> Path:
        """Return the path of a file that is to be opened.

        Raises:
            CheckpointError: If it must not be used: a link that leaves the folder, a pipe.
        """
        path = self.root / relative
        if relative in self.unusable:
            problem = f"is {self.unusable[relative]}, expected a file inside the model's folder"
            hint = "put the file itself there, or name the folder that holds it"
            raise CheckpointError(problem, where=str(path), hint=hint)
        return path


def list_folder(root: Path) -> Listing:
    """Return what a folder holds; links are followed to files inside it and to cached blobs only.

    Raises:
        CheckpointError: If the folder or one inside it cannot be read.
    """
    inside = _Inside(root)
    files: dict[str, tuple[str, ...]] = {}
    unusable: dict[str, str] = {}
    pending = [""]
    while pending:
        folder = pending.pop()
        names, folders = [], []
        for entry in _entries(root / folder):
            relative = joined(folder, entry.name)
            if not is_printable(entry.name):
                unusable[shown(relative)] = "a name with control characters or not in UTF-8"
                continue
            why = _unusable(entry, relative, inside)
            is_folder = entry.is_dir(follow_symlinks=False)
            if why:
                unusable[relative + "/" * is_folder] = why
            if is_folder and not why:
                folders.append(relative)
            elif not is_folder:
                names.append(entry.name)
        if names:
            files[folder] = tuple(names)
        pending.extend(reversed(folders))
    return Listing(root, files, unusable)


def joined(folder: str, name: str) -> str:
    """Return a path relative to the root, with forward slashes."""
    return f"{folder}/{name}" if folder else name


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            visible = [entry for entry in found if not entry.name.startswith(".")]
    except OSError as exc:
        problem = f"cannot read the folder: {exc.strerror}"
        raise CheckpointError(problem, where=str(folder), hint="check its permissions") from exc
    yield from sorted(visible, key=lambda entry: entry.name)


def _unusable(entry: os.DirEntry[str], relative: str, inside: _Inside) -> str:
    """Return why a file or folder is not to be used, or ""."""
    if entry.is_symlink():
        return inside.refused(entry.path)
    if not entry.is_dir():
        return "" if entry.is_file() else "neither a file nor a folder"
    if relative in RESERVED:
        return "a folder with the name of a file that every output has"
    if _TRAINING.fullmatch(entry.name):
        return "a checkpoint of a training run, not a part of this model"
    if relative.count("/") >= MAX_DEPTH:
        return f"nested deeper than {MAX_DEPTH} folders"
    return ""


class _Inside:
    """Where links of a folder may lead: into the folder, or to the blobs of the Hub's cache."""

    def __init__(self, root: Path) -> None:
        self._root = Path(os.path.realpath(root))
        snapshots = [p for p in (self._root, *self._root.parents) if p.parent.name == "snapshots"]
        self._blobs = snapshots[0].parent.parent / "blobs" if snapshots else None

    def refused(self, link: str) -> str:
        """Return why a link is not to be followed, or ""."""
        try:
            target = Path(os.path.realpath(link))
            is_file = stat.S_ISREG(target.stat().st_mode)
        except OSError:
            return "a broken link"
        if not (target.is_relative_to(self._root) or target.parent == self._blobs):
            return "a link that leaves the folder"
        return "" if is_file else "a link to a folder or device"
