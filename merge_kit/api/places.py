"""Paths as callers write them, whatever they hold: none of these functions fails."""

from __future__ import annotations

import os
from pathlib import Path


def place_of(path: str | os.PathLike[str]) -> Path:
    """Return an absolute path; the home of a user that is not there stays as it is written."""
    return Path(os.path.expanduser(path)).absolute()  # noqa: PTH111  (Path's raises)


def is_there(path: Path) -> bool:
    """Return whether something is at a path; a name that no file can have is not there."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, not readable, NUL
        return False
