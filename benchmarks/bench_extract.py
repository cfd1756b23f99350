#!/usr/bin/env python3
"""Time `mergekit extract` of a rank or a share of energy, and a peer's extraction of the rank.

    python benchmarks/bench_extract.py --folder FOLDER [--size 1.2B] [--rank 32] [--peer PEER]

Every figure is of a whole process, with a warm page cache; nobody waits for the disk, and outputs
are deleted between runs. The models are random: what a fine-tune has changed has a flat spectrum,
which is the slowest to find the largest values of. Shown are medians.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from measure import Finished, command_line, finish, markdown, program, record

SIZES = ("160M", "1.2B")
HEAD = ["extraction", "whole process", "at work", "peak memory", "promised", "missed"]


def timed(command: Sequence[str | Path], out: Path, runs: int) -> list[Finished]:
    """Return what a command took, run by run."""
    found = []
    for number in range(runs):
        shutil.rmtree(out, ignore_errors=True)
        found.append(finish(command))
        print(f"{command[0]} {number + 1}/{runs}: {found[-1].seconds:.1f} s", file=sys.stderr)
    shutil.rmtree(out)
    return found


def ours(mergekit: Path, models: tuple[Path, Path], wanted: Sequence[str], runs: int) -> list[str]:
    """Return the cells of our extraction."""
    base, tuned = models
    out = base.with_name("adapter.new")
    words = [mergekit, "extract", tuned, "--base", base, *wanted, "-o", out]
    shown = finish([*words, "--dry-run", "--json"]).output
    promised = json.loads(shown)["bill"]["peak_bytes"]
    figures = timed([*words, "--json"], out, runs)
    reports = [json.loads(one.output.strip().splitlines()[-1]) for one in figures]
    return [
        " ".join(wanted).replace("--", ""),
        f"{median(one.seconds for one in figures):.1f} s",
        f"{median(one['seconds'] for one in reports):.1f} s",
        f"{max(one.peak_bytes for one in figures) / 1e6:.0f} MB",
        f"{promised / 1e6:.0f} MB",
        f"{reports[0]['missed']['total']['share']:.3%}",
    ]


def peers(peer: Path, models: tuple[Path, Path], rank: int, runs: int) -> list[str]:
    """Return the cells of the peer's extraction."""
    base, tuned = models
    out = base.with_name("adapter.peer")
    words = ["--model", tuned, "--base-model", base, "--out-path", out, "--max-rank", str(rank)]
    figures = timed([peer, *words], out, runs)
    peak = max(one.peak_bytes for one in figures) / 1e6
    seconds = median(one.seconds for one in figures)
    return [f"peer, rank {rank}", f"{seconds:.1f} s", "", f"{peak:.0f} MB", "", ""]


def main() -> None:
    """Make the models if they are missing, measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for models and outputs")
    parser.add_argument("--size", choices=SIZES, default="1.2B")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--energy", type=float, action="append", default=[], help="repeatable")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peer-runs", type=int, default=1)
    parser.add_argument("--mergekit", type=Path, help="default: beside this Python")
    parser.add_argument("--peer", type=Path, help="environment that has mergekit-extract-lora")
    parser.add_argument("--write", action="store_true", help="append the table to RESULTS.md")
    options = parser.parse_args()
    folder = options.folder.resolve() / options.size
    maker = Path(__file__).parent / "make_models.py"
    subprocess.run([sys.executable, maker, folder, "--size", options.size], check=True)
    models = folder / "base", folder / "a"
    mergekit = program(options.mergekit)
    asked = [("--rank", str(options.rank)), *(("--energy", str(e)) for e in options.energy)]
    rows = [ours(mergekit, models, one, options.runs) for one in asked]
    if options.peer:
        peer = program(options.peer / "bin" / "mergekit-extract-lora")
        rows.append(peers(peer, models, options.rank, options.peer_runs))
    table = markdown(HEAD, rows)
    print(table)
    if options.write:
        places = {"FOLDER": options.folder, "PEER": options.peer, "MERGEKIT": options.mergekit}
        command = command_line("bench_extract.py", **places)
        record(f"Extraction from a {options.size} model, bf16", command, table)


if __name__ == "__main__":
    main()
