#!/usr/bin/env python3
"""Time stacks, depth upscaling and upcycling against `cp` of the same output bytes; and big plans.

    python benchmarks/bench_structures.py --folder FOLDER [--size 1.2B] [--runs 5]
                                          [--peer ENVIRONMENT]

As in bench_merge.py, every figure is of a whole process, programs take turns, and outputs are
deleted between rounds. The model that is upcycled has as many of the layers as let two outputs fit
on the disk; the row says how many. Plans are of true shapes, of which only the headers exist.
Exits with 1 if a stack or an upcycled model takes longer than the limit, or a plan does.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from statistics import median

from bench_merge import HEAD, LAYERS, Programs, copy, measured, row
from llama import BYTES, MODELS, Llama
from measure import Finished, command_line, finish, markdown, program, record

EXPERTS = 8
SPARE_BYTES = 3 * 10**9
"""Left free on the disk."""

LIMITS = {"stack": (1.5, 350e6), "upcycle": (1.5, None)}
"""By the first word of a row: most times `cp` for the whole process, most bytes of memory."""
PLAN_LIMITS_S = {"Goliath": 2.0}

PEER_PROGRAMS = ("mergekit-yaml", "mergekit-moe")
ANYWAY = "--i-understand-this-is-not-useful-without-training"  # the peer's word for copies


def layer_bytes(model: Llama, experts: int = 1) -> int:
    """Return the bytes of one layer with so many MLPs, and a router if they are several."""
    layer = [(n, prod(shape)) for n, shape in model.tensors() if n.startswith("model.layers.0.")]
    mlp = sum(size for name, size in layer if ".mlp." in name)
    router = experts * model.hidden if experts > 1 else 0
    return BYTES * (sum(size for _, size in layer) + (experts - 1) * mlp + router)


def output_bytes(model: Llama, layers: int, experts: int) -> int:
    """Return the bytes of a model of the first layers, with so many experts in each."""
    rest = BYTES * model.parameters - model.layers * layer_bytes(model)
    return rest + layers * layer_bytes(model, experts)


def layers_that_fit(model: Llama, free_bytes: int) -> int:
    """Return how many layers can be upcycled with two outputs and their dense model on the disk.

    Raises:
        SystemExit: If not even one can.
    """
    for layers in range(model.layers, 0, -1):
        needed = 2 * output_bytes(model, layers, EXPERTS) + output_bytes(model, layers, 1)
        if needed + SPARE_BYTES <= free_bytes:
            return layers
    sys.exit(f"{free_bytes / 1e9:.1f} GB are free, which is too little for one layer")


def slices(*parts: tuple[Path, int, int]) -> str:
    """Return a recipe that stacks ranges of layers."""
    listed = "\n".join(
        f"  - sources: [{{model: {path}, layer_range: [{start}, {stop}]}}]"
        for path, start, stop in parts
    )
    return f"merge_method: passthrough\nslices:\n{listed}\n"


def upcycled(dense: Path) -> str:
    """Return a recipe that makes experts of copies of one model."""
    return f"""\
merge_method: sparse_upcycle
base_model: {dense}
parameters: {{num_experts: {EXPERTS}, architecture: mixtral}}
"""


@dataclass(frozen=True, slots=True)
class Task:
    """One row.

    Attributes:
        text: Our recipe.
        peer_text: The peer's, "" if it cannot do the job.
        peer: Its program.
        peer_options: What it must be told.
    """

    text: str
    peer_text: str = ""
    peer: str = "mergekit-yaml"
    peer_options: tuple[str, ...] = ()


def tasks(folder: Path, size: str, shallow: tuple[Path, int]) -> dict[str, Task]:
    """Return the tasks by the names of their rows."""
    base, a, b = (folder / size / name for name in ("base", "a", "b"))
    n = LAYERS[size]
    part = n * 3 // 4
    stack = slices((a, 0, part), (b, n - part, n))
    solar = slices((a, 0, part), (a, n - part, n))
    upscale = f"merge_method: depth_upscale\nmodels: [{{model: {a}}}]\nparameters: "
    dense, layers = shallow
    upcycle = f"upcycle to {EXPERTS} experts, {layers} of {n} layers"
    copies = "\n".join([f"  - {{source_model: {dense}}}"] * EXPERTS)
    moe = f"base_model: {dense}\ngate_mode: random\ndtype: bfloat16\nexperts:\n{copies}\n"
    return {
        f"stack of {2 * part} of {n} + {n} layers": Task(stack, stack + "dtype: bfloat16\n"),
        f"drop, {2 * part} layers": Task(
            f"{upscale}{{target_layers: {2 * part}}}\n", solar + "dtype: bfloat16\n"
        ),
        f"sum, {2 * part} layers": Task(
            f"{upscale}{{target_layers: {2 * part}, overlap_mode: sum}}\n"
        ),
        f"sum by slerp, {2 * part} layers": Task(
            f"{upscale}{{target_layers: {2 * part}, overlap_mode: sum, blend: slerp}}\n"
        ),
        f"expansion by {n // 4} layers": Task(
            f"{upscale}{{target_layers: {n + n // 4}, block_expansion: true}}\n"
        ),
        upcycle: Task(upcycled(dense), moe, "mergekit-moe", (ANYWAY,)),
        f"{upcycle}, mergekit-moe": Task(moe),
        "three fine-tunes as experts, the rest averaged": Task(
            f"merge_method: sparse_upcycle\nbase_model: {base}\n"
            f"models: [{{model: {base}}}, {{model: {a}}}, {{model: {b}}}]\n"
            "parameters: {non_experts: average, architecture: mixtral}\n"
        ),
    }


@dataclass(frozen=True, slots=True)
class StructurePrograms(Programs):
    """What takes part.

    Attributes:
        peers: The peer's programs by name, none if it takes no part.
        task: What they do.
    """

    peers: Mapping[str, Path] = field(default_factory=dict)
    task: Task = field(default_factory=lambda: Task(""))

    def contenders(self, recipe: Path, out: Path) -> dict[str, Callable[[], Finished]]:
        """Return what runs in every round, in order, by the name of its column."""
        shown: dict[str, Callable[[], Finished]] = {
            "ours": lambda: self.run(recipe, out),
            "cp": lambda: copy(recipe, out),
        }
        if self.peers and self.task.peer_text:
            theirs = recipe.with_suffix(".peer.yaml")
            theirs.write_text(self.task.peer_text)
            words = [self.peers[self.task.peer], theirs, out, *self.task.peer_options]
            shown["peer"] = lambda: finish(words)
        return shown


def shallow_model(folder: Path, size: str, ours: Path, layers: int) -> Path:
    """Make a model of the first layers of the base, if it is not there."""
    if layers == LAYERS[size]:
        return folder / size / "base"
    target = folder / size / f"base-{layers}"
    if not target.exists():
        recipe = folder / f"{size}-base-{layers}.yaml"
        recipe.write_text(slices((folder / size / "base", 0, layers)))
        finish([ours, "run", recipe, "-o", target, "--shard-size", "500MB"])
    return target


GOLIATH = ((0, 16), (8, 24), (17, 32), (25, 40), (33, 48), (41, 56), (49, 64), (57, 72), (65, 80))


def plans(folder: Path) -> dict[str, tuple[str, str]]:
    """Return shape and recipe of each plan, by its row's name."""
    twin = {size: [folder / size / name for name in ("one", "other")] for size in MODELS}
    mistral, llama, large = (twin[s] for s in ("Mistral-7B", "Llama-2-70B", "Llama-3.1-405B"))
    goliath = slices(*((llama[i % 2], *ends) for i, ends in enumerate(GOLIATH)))
    upscale = f"merge_method: depth_upscale\nmodels: [{{model: {mistral[0]}}}]\nparameters: "
    return {
        "Goliath": ("Llama-2-70B", goliath),
        "SOLAR, slices": ("Mistral-7B", slices((mistral[0], 0, 24), (mistral[0], 8, 32))),
        "SOLAR, drop": ("Mistral-7B", f"{upscale}{{target_layers: 48}}\n"),
        "SOLAR, sum": ("Mistral-7B", f"{upscale}{{target_layers: 48, overlap_mode: sum}}\n"),
        "405B on itself": ("Llama-3.1-405B", slices((large[0], 0, 84), (large[0], 42, 126))),
        f"Mistral to {EXPERTS} experts": ("Mistral-7B", upcycled(mistral[0])),
        f"405B to {EXPERTS} experts": ("Llama-3.1-405B", upcycled(large[0])),
    }


def is_asked(name: str, only: Sequence[str]) -> bool:
    """Return whether a row is to be measured."""
    return not only or any(name.startswith(word) for word in only)


def planned(folder: Path, ours: Path, runs: int, only: list[str]) -> tuple[str, list[str]]:
    """Write the headers, plan, and return a table and what took too long."""
    maker = Path(__file__).parent / "make_twins.py"
    rows, late = [], []
    for name, (size, text) in plans(folder).items():
        if not is_asked(name, only):
            continue
        subprocess.run([sys.executable, maker, folder / size, "--size", size], check=True)
        recipe = folder / f"{name.replace(' ', '-').replace(',', '')}.yaml"
        recipe.write_text(text)
        taken = [finish([ours, "plan", recipe]) for _ in range(runs + 1)][1:]
        seconds = median(run.seconds for run in taken)
        facts = json.loads(finish([ours, "plan", recipe, "--json"]).output)
        rows.append(
            [
                name,
                str(facts["layers"]),
                f"{facts['parameters'] / 1e9:.2f} B",
                f"{facts['bill']['written_bytes'] / 1e9:.1f} GB",
                f"{seconds:.2f} s",
                f"{max(run.peak_bytes for run in taken) / 1e6:.0f} MB",
            ]
        )
        if seconds > PLAN_LIMITS_S.get(name, float("inf")):
            late.append(f"the plan of {name} took {seconds:.2f} s")
    head = ["plan", "layers", "parameters", "output", "whole process", "peak memory"]
    return markdown(head, rows) if rows else "", late


def over(name: str, figures: dict[str, list[Finished]]) -> list[str]:
    """Return what in a row is over its limits."""
    times, most = LIMITS.get(name.split(maxsplit=1)[0], (None, None))
    pairs = zip(figures["ours"], figures["cp"], strict=True)
    ratio = median(ours.seconds / copied.seconds for ours, copied in pairs)
    peak = max(run.peak_bytes for run in figures["ours"])
    found = []
    if times and ratio > times:
        found.append(f"{name} took {ratio:.2f} x cp, the limit is {times}")
    if most and peak > most:
        found.append(f"{name} took {peak / 1e6:.0f} MB, the limit is {most / 1e6:.0f} MB")
    return found


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for models and outputs")
    parser.add_argument("--size", choices=LAYERS, default="1.2B")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--only", action="append", default=[], help="rows that begin like this only; repeatable"
    )
    parser.add_argument("--layers", type=int, help="to upcycle; default: as many as fit")
    parser.add_argument("--mergekit", type=Path, help="default: beside this Python")
    parser.add_argument("--option", action="append", default=[], help="a further option of `run`")
    parser.add_argument("--peer", type=Path, help="environment that has mergekit-yaml")
    parser.add_argument("--write", action="store_true", help="append the tables to RESULTS.md")
    return parser.parse_args()


def merged(options: argparse.Namespace, ours: Path, folder: Path) -> tuple[str, list[str]]:
    """Make the models, measure, and return a table and what is over its limits."""
    if not any(is_asked(name, options.only) for name in tasks(folder, options.size, (folder, 0))):
        return "", []
    maker = Path(__file__).parent / "make_models.py"
    target = folder / options.size
    subprocess.run([sys.executable, maker, target, "--size", options.size], check=True)
    free = shutil.disk_usage(folder).free
    layers = options.layers or layers_that_fit(MODELS[options.size], free)
    shallow = shallow_model(folder, options.size, ours, layers), layers
    peers = {}
    if options.peer:
        peers = {name: program(options.peer / "bin" / name) for name in PEER_PROGRAMS}
    rows, late = [], []
    for number, (name, task) in enumerate(tasks(folder, options.size, shallow).items()):
        if not is_asked(name, options.only):
            continue
        recipe = folder / f"{options.size}-structure-{number}.yaml"
        recipe.write_text(task.text)
        programs = StructurePrograms(ours, tuple(options.option), None, False, peers, task)
        figures = measured(programs, recipe, options.runs)
        rows.append(row(name, figures))
        late += over(name, figures)
    shown = len(HEAD) + (2 if peers else 0)
    head = [*HEAD, "peer", "peer / process"][:shown]
    return markdown(head, [cells[:shown] for cells in rows]), late


def main() -> None:
    """Measure, print, write if asked to; exit with 1 if a limit is passed."""
    options = arguments()
    folder, ours = options.folder.resolve(), program(options.mergekit)
    folder.mkdir(parents=True, exist_ok=True)
    plan_table, late_plans = planned(folder, ours, options.runs, options.only)
    merge_table, late = merged(options, ours, folder)
    table = "\n\n".join(part for part in (plan_table, merge_table) if part)
    print(table)
    if options.write:
        places = {"FOLDER": options.folder, "PEER": options.peer, "MERGEKIT": options.mergekit}
        command = command_line("bench_structures.py", **places)
        record(f"Models of another structure, from {options.size} models, bf16", command, table)
    if late or late_plans:
        sys.exit("\n".join(late_plans + late))


if __name__ == "__main__":
    main()
