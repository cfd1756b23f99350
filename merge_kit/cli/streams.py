"""Standard streams that are closed, full, or of an encoding that lacks a character."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress


class Nowhere(io.TextIOBase):
    """Takes text and forgets it."""

    def write(self, text: str, /) -> int:
        return len(text)


def prepare_streams() -> None:
    """Make sure that the standard streams take whatever is printed.

    Where one is closed, the null device takes its place: else the next file that is opened, an
    output perhaps, has its number and gets what is meant for it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stdout is None:
        sys.stdout = Nowhere()
    if sys.stderr is None:
        sys.stderr = Nowhere()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def complain(text: str) -> None:
    """Print to standard error; where nobody can read that, the exit code must do."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
