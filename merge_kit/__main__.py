"""`python -m merge_kit` is `mergekit`."""

from __future__ import annotations

import sys

from merge_kit.cli import main

if __name__ == "__main__":
    sys.exit(main())
