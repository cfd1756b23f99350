#!/usr/bin/env python3
"""Time `mergekit plan` on models of real size, of which only the headers exist.

    python benchmarks/bench_plan.py --folder FOLDER [--size Llama-3.1-405B] [--runs 5]

A plan reads headers only, so it takes as long for these files as for the real ones.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median

from measure import command_line, finish, markdown, program, record

SIZES = ("Mistral-7B", "Llama-2-70B", "Llama-3.1-405B")
LIMIT_S = 2.0

RECIPE = """\
merge_method: slerp
base_model: {one}
models: [{{model: {other}}}]
parameters: {{t: 0.4}}
dtype: bfloat16
"""


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for the headers")
    parser.add_argument("--size", choices=SIZES, action="append", help="default: all; repeatable")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--mergekit", type=Path, help="default: beside this Python")
    parser.add_argument("--write", action="store_true", help="append the table to RESULTS.md")
    return parser.parse_args()


def main() -> None:
    """Write the headers, measure, print; exit with 1 if a plan takes longer than the limit."""
    options = arguments()
    ours = program(options.mergekit)
    rows, slowest = [], 0.0
    for size in options.size or SIZES:
        folder = options.folder.resolve() / size
        maker = Path(__file__).parent / "make_twins.py"
        subprocess.run([sys.executable, maker, folder, "--size", size], check=True)
        recipe = folder / "plan.yaml"
        recipe.write_text(RECIPE.format(one=folder / "one", other=folder / "other"))
        runs = [finish([ours, "plan", recipe]) for _ in range(options.runs + 1)][1:]
        seconds = median(run.seconds for run in runs)
        slowest = max(slowest, seconds)
        peak = max(run.peak_bytes for run in runs)
        rows.append([f"2 × {size}", f"{seconds:.2f} s", f"{peak / 1e6:.0f} MB"])
    table = markdown(["plan", "whole process", "peak memory"], rows)
    print(table)
    if options.write:
        record(
            "Plans from headers",
            command_line("bench_plan.py", FOLDER=options.folder, MERGEKIT=options.mergekit),
            table,
        )
    if slowest > LIMIT_S:
        sys.exit(f"a plan took {slowest:.2f} s, the limit is {LIMIT_S} s")


if __name__ == "__main__":
    main()
