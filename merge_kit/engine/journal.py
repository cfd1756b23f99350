"""What a run has finished, line by line, so that the next one goes on from there."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from merge_kit.errors import OutputError

FOLDER = ".merge_kit"
"""Folder inside the partial output for what only a run needs; it never reaches the output."""


class Journal:
    """An append-only file of finished steps: {"step": index, "hashes": {key: hash}}."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FOLDER / "journal.jsonl"
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
            self._file = self._path.open("a", encoding="utf-8")
            self._file.write("\n" if torn else "")
        except OSError as exc:
            raise OutputError(f"cannot write: {exc.strerror}", where=self._path.name) from exc
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def finished(self) -> dict[int, dict[str, str]]:
        """Return the hashes by step that earlier runs wrote; a torn last line is left out."""
        found: dict[int, dict[str, str]] = {}
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                found[int(entry["step"])] = dict(entry["hashes"])
            except (ValueError, KeyError, TypeError):
                continue  # torn by a crash: the step is done again
        return found

    def write(self, step: int, hashes: Mapping[str, str]) -> None:
        """Add a finished step."""
        line = json.dumps({"step": step, "hashes": dict(hashes)}) + "\n"
        try:
            with self._lock:
                self._file.write(line)
                self._file.flush()
        except OSError as exc:
            raise OutputError(f"cannot write: {exc.strerror}", where=self._path.name) from exc
