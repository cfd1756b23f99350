"""Problems and notes as planning goes on: each once, all in one list."""

from __future__ import annotations

from merge_kit.errors import MergeKitError, raise_all


class Findings:
    """Collects problems and notes."""

    def __init__(self) -> None:
        self._errors: dict[str, MergeKitError] = {}
        self._notes: dict[str, None] = {}

    def problem(self, error: MergeKitError) -> None:
        """Keep a problem, unless the same was found before."""
        self._errors.setdefault(str(error), error)

    def note(self, sentence: str) -> None:
        """Keep a note, unless the same was made before."""
        self._notes.setdefault(sentence)

    @property
    def notes(self) -> tuple[str, ...]:
        """Every note, in the order in which they were made."""
        return tuple(self._notes)

    def raise_any(self) -> None:
        """Raise all problems found so far, if there are any."""
        raise_all(list(self._errors.values()))
