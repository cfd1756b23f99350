#!/usr/bin/env python3
"""Write models of real shapes that hold headers only: the weights are holes in sparse files.

    python benchmarks/make_twins.py FOLDER [--size Llama-3.1-405B] [--shard-mb 5000]

Two models, `one` and `other`, take a few megabytes on the disk and can be planned, not merged.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from llama import MODELS, Llama, shards, write_side_files

NAMES = ("one", "other")


def make(target: Path, model: Llama, shard_bytes: int) -> int:
    """Write the headers of one model, its files as long as the real ones; return their number."""
    target.mkdir(parents=True, exist_ok=True)
    files = shards(model, shard_bytes)
    for shard in files:
        header = shard.header()
        path = target / shard.name
        path.write_bytes(header)
        os.truncate(path, len(header) + shard.data_bytes)
    write_side_files(target, model, files)
    return len(files)


def main() -> None:
    """Make the twins that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=MODELS, default="Llama-3.1-405B")
    parser.add_argument("--shard-mb", type=int, default=5000)
    options = parser.parse_args()
    for name in NAMES:
        count = make(options.folder / name, MODELS[options.size], options.shard_mb * 10**6)
        print(
            f"{options.folder / name}: {MODELS[options.size].parameters:,} weights, {count} files"
        )


if __name__ == "__main__":
    main()
