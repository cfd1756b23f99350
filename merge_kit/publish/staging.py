"""The output folder appears whole or not at all.

A run works in a folder beside the output and renames it in the end. Beside `OUT` there may be

    OUT.partial            what a run writes; what only the run needs is in its `.merge_kit/`
    OUT.partial.lock       held by the process that works on it
    OUT.partial.state      `.merge_kit/`, moved aside for the moment of the rename
    OUT.partial.replaced   the old output, until it is deleted

All of them are gone after a run that succeeded. After one that died, the next goes on from them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from merge_kit.errors import OutputError, OutputExistsError
from merge_kit.publish.failures import writing
from merge_kit.publish.lock import Lock
from merge_kit.publish.places import (
    is_empty,
    make_folders,
    real_place,
    refuse_existing,
    refuse_inputs,
    refuse_reserved,
    remove_empty,
)
from merge_kit.publish.swap import put_in_place, remove, sync, sync_tree

STATE = ".merge_kit"
"""Folder inside the partial output for what only a run needs; it never reaches the output."""

MANIFEST = "merge_kit.json"
"""The record of a merge, in the folder that it made."""


def stage(output: Path, *, overwrite: bool, inputs: Sequence[Path], identity: str) -> Staging:
    """Return the context in which an output is written.

    Args:
        output: The folder that is to appear; links are followed.
        overwrite: Replace a folder that is there.
        inputs: Folders and files that must stay as they are.
        identity: Says what is made; what another run of the same identity left is kept.
    """
    return Staging(output, overwrite=overwrite, inputs=inputs, identity=identity)


class Staging:
    """A folder that becomes the output when it is committed; see `stage`.

    Entering raises OutputExistsError if the place is taken, an input, inside or around one;
    LockedError if another run works on it; OutputError if the system refuses.
    """

    def __init__(
        self, output: Path, *, overwrite: bool, inputs: Sequence[Path], identity: str
    ) -> None:
        self._where, self._overwrite = str(output), overwrite
        self._inputs, self._identity = tuple(inputs), identity
        with writing(output):
            self._place = real_place(output)
        refuse_reserved(self._place, self._where)
        name = f"{self._place.name}.partial"
        self.folder = self._place.with_name(name)
        self._lock = self._place.with_name(f"{name}.lock")
        self._aside = self._place.with_name(f"{name}.state")
        self._replaced = self._place.with_name(f"{name}.replaced")
        self._committed = False
        self._made: list[Path] = []
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        with writing(self._place):
            for path in (self._place, self.folder, self._aside, self._replaced):
                refuse_inputs(path, self._inputs, self._where)
            refuse_existing(self._place, self._where, overwrite=self._overwrite)
        with ExitStack() as undo, writing(self._place):
            self._made = make_folders(self._place.parent)
            undo.callback(remove_empty, self._made)
            undo.enter_context(Lock(self._lock, self._where))
            self._recover()
            refuse_existing(self._place, self._where, overwrite=self._overwrite)
            self._prepare()
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with writing(self.folder), self._undo:
                if not self._committed:
                    self._leave()
        except OutputError as problem:
            if error is None:
                raise
            error.add_note(str(problem))  # what stopped the run matters more

    def commit(self, *, sync: bool) -> None:
        """Give the folder the output's name, without what only the run needed.

        Args:
            sync: Return only when everything is on disk.

        Raises:
            OutputExistsError: If something has appeared there since.
            OutputError: If the system refuses; the folder stays, and the next run goes on from it.
        """
        with writing(self._place):
            refuse_existing(self._place, self._where, overwrite=self._overwrite)
            self._move_aside()
            try:
                if sync:
                    sync_tree(self.folder)
                put_in_place(self.folder, self._place, self._replaced)
            except OSError:
                self._recover()
                raise
            self._committed = True
            if sync:
                self._sync_names()
            remove(self._aside)
        self._delete_replaced()

    def _move_aside(self) -> None:
        """Take the run's own files out of the folder, with a note which folder that was."""
        state = self.folder / STATE
        (state / "folder").write_text(str(self.folder.stat().st_ino), encoding="ascii")
        state.rename(self._aside)

    def _recover(self) -> None:
        """Undo what a commit that stopped halfway left."""
        if self._replaced.is_dir() and not os.path.lexists(self._place):
            self._replaced.rename(self._place)
        remove(self._replaced)
        note = _text(self._aside / "folder")
        unfinished = self.folder.is_dir() and not (self.folder / STATE).exists()
        if unfinished and note == str(self.folder.stat().st_ino):  # else it is the old output
            self._aside.rename(self.folder / STATE)
        remove(self._aside)

    def _prepare(self) -> None:
        """Make the folder, or keep the one of an earlier run of the same identity."""
        folder, state = self.folder, self.folder / STATE
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            hint = f"remove {folder.name}"
            raise OutputError(f"{folder.name} is no folder", where=self._where, hint=hint)
        folder.mkdir(exist_ok=True)
        found = None if state.is_symlink() else _text(state / "identity")
        if found == self._identity:
            return
        is_ours = state.is_dir() or (folder / MANIFEST).is_file() or is_empty(folder)
        if not is_ours or state.is_symlink():
            problem = f"{folder.name} is needed, and was not left by an earlier run"
            hint = f"move {folder.name} away, or choose another folder with -o"
            raise OutputExistsError(problem, where=self._where, hint=hint)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == STATE):
            remove(path)  # the identity last: while it stands, what is left is known to be stale
        try:
            state.mkdir()
            (state / "identity").write_text(self._identity, encoding="utf-8")
        except OSError:
            remove(folder)
            raise

    def _leave(self) -> None:
        """Keep the folder if the next run can go on from it, else remove it."""
        self._recover()
        state = self.folder / STATE
        journals = [*state.glob("journal*"), *state.glob("fitted*")]
        if not any(path.stat().st_size for path in journals):
            remove(self.folder)

    def _sync_names(self) -> None:
        for folder in (self._place, *self._made):
            sync(folder.parent)

    def _delete_replaced(self) -> None:
        try:
            remove(self._replaced)
        except OSError as exc:
            problem = f"was written, but the old one cannot be deleted: {exc.strerror}"
            hint = f"delete {self._replaced.name} by hand"
            raise OutputError(problem, where=self._where, hint=hint) from exc


def _text(path: Path) -> str | None:
    """Return what a file of the run's own says, None if it is not there."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
