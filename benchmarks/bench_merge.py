#!/usr/bin/env python3
"""Time `mergekit run` against `cp` of the same output bytes, and against a peer.

    python benchmarks/bench_merge.py --folder FOLDER [--size 1.2B] [--runs 5] [--peer ENVIRONMENT]

Every figure is of a whole process. In each round the programs run one after the other, in the same
minute: `mergekit run`, then `cp -r` of what it wrote, then the peer with its defaults and with its
best settings. The page cache is warm, nobody waits for the disk, and outputs are deleted between
runs. Shown are medians, and medians of the ratios taken round by round.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from measure import Finished, command_line, finish, markdown, program, record

BEST = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "34359738368"}
"""Keeps glibc from giving the peer's memory back and taking it again, tensor by tensor."""
LAYERS = {"160M": 12, "1.2B": 16}


def recipes(folder: Path, size: str) -> dict[str, str]:
    """Return the recipes by name, in the dialect that the peer reads too."""
    base, a, b = (folder / size / name for name in ("base", "a", "b"))
    n = LAYERS[size]
    low, high = n // 4, n * 3 // 4

    def task_vectors(method: str, parameters: str) -> str:
        return f"""\
merge_method: {method}
base_model: {base}
models:
  - {{model: {a}, parameters: {{weight: 0.6}}}}
  - {{model: {b}, parameters: {{weight: 0.4}}}}
parameters: {{{parameters}}}
dtype: bfloat16
"""

    return {
        "linear": f"""\
merge_method: linear
models:
  - {{model: {a}, parameters: {{weight: 0.6}}}}
  - {{model: {b}, parameters: {{weight: 0.4}}}}
dtype: bfloat16
""",
        "task_arithmetic": f"""\
merge_method: task_arithmetic
base_model: {base}
models:
  - {{model: {a}, parameters: {{weight: 0.6}}}}
  - {{model: {b}, parameters: {{weight: 0.4}}}}
dtype: bfloat16
""",
        "slerp": f"""\
merge_method: slerp
base_model: {a}
models: [{{model: {b}}}]
parameters: {{t: 0.4}}
dtype: bfloat16
""",
        "passthrough": f"""\
merge_method: passthrough
slices:
  - sources: [{{model: {a}, layer_range: [0, {high}]}}]
  - sources: [{{model: {b}, layer_range: [{low}, {n}]}}]
dtype: bfloat16
""",
        "ties": task_vectors("ties", "density: 0.2"),
        "ties-model": task_vectors("ties", "density: 0.2, scope: model"),
        "dare_linear": task_vectors("dare_linear", "density: 0.2"),
        "dare_ties": task_vectors("dare_ties", "density: 0.2"),
        "breadcrumbs": task_vectors("breadcrumbs", "density: 0.9, gamma: 0.01"),
        "breadcrumbs_ties": task_vectors("breadcrumbs_ties", "density: 0.9, gamma: 0.01"),
        "della": task_vectors("della", "density: 0.5, epsilon: 0.1"),
        "model_stock": f"""\
merge_method: model_stock
base_model: {base}
models: [{{model: {a}}}, {{model: {b}}}]
dtype: bfloat16
""",
    }


OURS = ("ties-model",)
"""Recipes that the peer cannot read."""


@dataclass(frozen=True, slots=True)
class Programs:
    """What takes part: our program and its extra options, and the peer's, if there is one."""

    ours: Path
    options: tuple[str, ...]
    peer: Path | None
    best: bool

    def run(self, recipe: Path, out: Path) -> Finished:
        return finish([self.ours, "run", recipe, "-o", out, "--json", *self.options])

    def contenders(self, recipe: Path, out: Path) -> dict[str, Callable[[], Finished]]:
        """Return what runs in every round, in order, by the name of its column."""
        shown: dict[str, Callable[[], Finished]] = {
            "ours": lambda: self.run(recipe, out),
            "cp": lambda: copy(recipe, out),
        }
        if self.peer and recipe.stem.partition("-")[2] not in OURS:
            peer: list[str | Path] = [self.peer, recipe, out]
            best = [*peer, "--out-shard-size", "500M"]
            shown["peer"] = lambda: finish(peer)
            if self.best:
                shown["peer, best"] = lambda: finish(best, BEST)
        return shown


def copy(recipe: Path, out: Path) -> Finished:
    """Copy the output as a plain program does."""
    return finish(["cp", "-r", "--reflink=never", reference(recipe), out])


def reference(recipe: Path) -> Path:
    """Return the folder with the output that `cp` copies."""
    return recipe.with_suffix(".out")


def measured(programs: Programs, recipe: Path, runs: int) -> dict[str, list[Finished]]:
    """Return what each contender took in each round, after one round that does not count."""
    out = recipe.with_suffix(".new")
    for folder in (out, reference(recipe)):
        shutil.rmtree(folder, ignore_errors=True)
    programs.run(recipe, reference(recipe))
    contenders = programs.contenders(recipe, out)
    figures: dict[str, list[Finished]] = {name: [] for name in contenders}
    for number in range(runs + 1):
        copy(recipe, out)  # a virtual machine may have to ask its host for memory: not in the race
        shutil.rmtree(out)
        for name, contender in contenders.items():
            if not number and "peer" in name:
                continue  # the others have warmed the page cache
            taken = contender()
            if number:
                figures[name].append(taken)
            print(f"{recipe.stem} {number}/{runs} {name}: {taken.seconds:.2f} s", file=sys.stderr)
            shutil.rmtree(out)
    shutil.rmtree(reference(recipe))
    return figures


def report(output: str) -> dict[str, float]:
    """Return the report in the last line of JSON that a run prints."""
    found = json.loads(output.strip().splitlines()[-1])
    return {key: float(found[key]) for key in ("seconds", "peak_bytes")}


def row(name: str, figures: dict[str, list[Finished]]) -> list[str]:
    """Return the cells of one merge."""
    ours, copy = figures["ours"], figures["cp"]
    reports = [report(one.output) for one in ours]

    def ratio(over: Sequence[float], under: Sequence[float]) -> str:
        return f"{median(a / b for a, b in zip(over, under, strict=True)):.2f}"

    whole, copied = ([one.seconds for one in many] for many in (ours, copy))
    merging = [one["seconds"] for one in reports]
    cells = [
        name,
        f"{median(whole):.2f} s",
        f"{median(merging):.2f} s",
        f"{median(copied):.2f} s",
        ratio(whole, copied),
        ratio(merging, copied),
        f"{max(one.peak_bytes for one in ours) / 1e6:.0f} MB",
    ]
    for peer in ("peer", "peer, best"):
        if peer not in figures:
            cells += ["", ""]
        else:
            seconds = [one.seconds for one in figures[peer]]
            peak = max(one.peak_bytes for one in figures[peer])
            cells += [f"{median(seconds):.2f} s, {peak / 1e6:.0f} MB", ratio(seconds, whole)]
    return cells


HEAD = ["merge", "whole process", "merging", "cp", "process / cp", "merging / cp", "peak memory"]
PEER_HEAD = ["peer", "peer / process", "peer, best settings", "best / process"]


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for models and outputs")
    parser.add_argument("--size", choices=LAYERS, default="1.2B")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", action="append", help="merge by this method only; repeatable")
    parser.add_argument("--mergekit", type=Path, help="default: beside this Python")
    parser.add_argument("--option", action="append", default=[], help="a further option of `run`")
    parser.add_argument("--peer", type=Path, help="environment that has mergekit-yaml")
    parser.add_argument("--no-best", action="store_true", help="the peer with its defaults only")
    parser.add_argument("--write", action="store_true", help="append the table to RESULTS.md")
    return parser.parse_args()


def main() -> None:
    """Make the models if they are missing, measure, print, and write if asked to."""
    options = arguments()
    folder = options.folder.resolve()
    maker = Path(__file__).parent / "make_models.py"
    subprocess.run(
        [sys.executable, maker, folder / options.size, "--size", options.size], check=True
    )
    peer = options.peer and program(options.peer / "bin" / "mergekit-yaml")
    best = not options.no_best
    programs = Programs(program(options.mergekit), tuple(options.option), peer, best)
    rows = []
    for name, text in recipes(folder, options.size).items():
        if options.only and name not in options.only:
            continue
        recipe = folder / f"{options.size}-{name}.yaml"
        recipe.write_text(text)
        rows.append(row(name, measured(programs, recipe, options.runs)))
    head = [*HEAD, *PEER_HEAD] if peer else HEAD
    shown = len(head) - 2 * (peer is not None and options.no_best)
    table = markdown(head[:shown], [cells[:shown] for cells in rows])
    print(table)
    if options.write:
        command = command_line(
            "bench_merge.py", FOLDER=options.folder, PEER=options.peer, MERGEKIT=options.mergekit
        )
        record(f"Merges of {options.size} models, bf16", command, table)


if __name__ == "__main__":
    main()
