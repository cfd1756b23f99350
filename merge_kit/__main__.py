"""`python -m merge_kit` is `mergekit`."""

from __future__ import annotations

from merge_kit.cli import program

if __name__ == "__main__":
    program()
