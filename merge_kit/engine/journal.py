"""What a run has finished, line by line, so that the next one goes on from there."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from merge_kit.errors import OutputError

FOLDER = ".merge_kit"
"""Folder inside the partial output for what only a run needs; it never reaches the output."""


@dataclass(frozen=True, slots=True)
class Finished:
    """What is known of the outputs of a finished step, by their keys.

    Attributes:
        nonfinite: NaN and infinities that were written.
        saturated: Values beyond the output dtype.
        facts: See `Report.facts`.
    """

    hashes: Mapping[str, str]
    nonfinite: Mapping[str, int]
    saturated: Mapping[str, int]
    facts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class Journal:
    """An append-only file: a line of JSON for each finished step, its index and what is known.

    Args:
        name: Of the file.
    """

    def __init__(self, folder: Path, name: str = "journal.jsonl") -> None:
        self._path = folder / FOLDER / name
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
            self._file = self._path.open("ab", buffering=0)
            self._file.write(b"\n" if torn else b"")
        except OSError as exc:
            raise self._failed(exc) from exc
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def finished(self) -> dict[int, Finished]:
        """Return what earlier runs finished, by step."""
        found: dict[int, Finished] = {}
        for index, entry in self.entries():
            try:
                found[index] = _finished(entry)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # the step is done again
        return found

    def entries(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield what earlier runs wrote, with the step's index; a torn last line is left out."""
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                index = int(entry.pop("step"))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # torn by a crash: the step is done again
            yield index, entry

    def write(self, step: int, finished: Finished) -> None:
        """Add a finished step."""
        self.add(step, asdict(finished))

    def add(self, step: int, entry: Mapping[str, Any]) -> None:
        """Add a line about a step."""
        line = (json.dumps({"step": step, **entry}) + "\n").encode()
        try:
            with self._lock:
                written = self._file.write(line)
        except OSError as exc:
            raise self._failed(exc) from exc
        if written != len(line):
            raise OutputError("the disk is full", where=self._path.name, hint=_HINT)

    def _failed(self, exc: OSError) -> OutputError:
        return OutputError(f"cannot write: {exc.strerror}", where=self._path.name, hint=_HINT)


_HINT = "check the disk and run again: it goes on where it stopped"


def _finished(entry: dict[str, Any]) -> Finished:
    facts = {key: dict(found) for key, found in entry.get("facts", {}).items()}
    nonfinite, saturated = dict(entry["nonfinite"]), dict(entry["saturated"])
    return Finished(dict(entry["hashes"]), nonfinite, saturated, facts)
