"""How a run shows its progress: a bar, lines of JSON, or nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import NoReturn

from tqdm import tqdm

from merge_kit.cli.text import print_json_line
from merge_kit.engine.progress import Progress


class Quiet(AbstractContextManager["Quiet"]):
    """Shows nothing."""

    def show(self, progress: Progress) -> None:
        """Take one event."""

    def __exit__(self, *exc: object) -> None:
        return None


class Lines(Quiet):
    """One JSON object a line on standard output."""

    def show(self, progress: Progress) -> None:
        print_json_line(asdict(progress))


class Bar(Quiet):
    """A bar on standard error with rate and time left, if that is a terminal."""

    def __init__(self) -> None:
        self._bar: tqdm[NoReturn] | None = None

    def show(self, progress: Progress) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=progress.total_bytes, unit="B", unit_scale=True, ncols=80, disable=None
            )
        try:
            self._bar.update(progress.done_bytes - self._bar.n)
        except OSError:  # the terminal is gone; that is no reason to end the run
            self._bar.disable = True

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()
