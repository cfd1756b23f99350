"""The command line: click commands over the library, errors as messages and exit codes."""

from __future__ import annotations

from merge_kit.cli.entry import main, program

__all__ = ["main", "program"]
