#!/usr/bin/env python3
"""Time merges of LoRA adapters: into a model, side by side, and truncated.

    python benchmarks/bench_adapters.py --folder FOLDER [--size 1.2B] [--runs 5]
                                        [--peer ENVIRONMENT] [--peft ENVIRONMENT]

As in bench_merge.py, every figure is of a whole process, programs take turns, and `cp -r` is of the
bytes that were written. Adapters change all linear layers, in bf16. Peers, where they can do the
job: arcee-ai's mergekit, and a short program that uses peft (peft_peer.py), both with their
defaults.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench_merge import HEAD, Programs, copy, measured, row
from llama import MODELS
from make_adapters import make_adapter
from measure import Finished, command_line, finish, markdown, program, record

TWIN = "Mistral-7B"
"""Shape of the adapters that are combined without their model."""

INTO = ("into-16", "into-64")


def recipes(folder: Path, size: str) -> dict[str, str]:
    """Return the recipes by name."""
    base = folder / size / "base"
    small, large = (folder / size / f"adapter-{rank}" for rank in (16, 64))
    one, two = (folder / TWIN / f"adapter-{name}" for name in ("one", "two"))

    def into(adapter: Path) -> str:
        return f"""\
merge_method: passthrough
models: [{{model: {base}+{adapter}}}]
dtype: bfloat16
"""

    def combined(method: str, first: Path, second: Path, more: str = "") -> str:
        return f"""\
merge_method: {method}
models:
  - {{model: {first}, parameters: {{weight: 0.6}}}}
  - {{model: {second}, parameters: {{weight: 0.4}}}}
{more}"""

    rank = "parameters: {rank: 64}\n"
    return {
        "into-16": into(small),
        "into-64": into(large),
        "concat": combined("lora_concat", small, large),
        "svd": combined("lora_svd", small, large, rank),
        "concat-7B": combined("lora_concat", one, two),
        "svd-7B": combined("lora_svd", one, two, rank),
    }


@dataclass(frozen=True, slots=True)
class AdapterPrograms(Programs):
    """What takes part.

    Attributes:
        peft: Python of an environment with peft, if it takes part.
        inputs: Base and adapters of each recipe that peft can do, by the recipe's name.
    """

    peft: Path | None = None
    inputs: Mapping[str, tuple[Path, ...]] | None = None

    def contenders(self, recipe: Path, out: Path) -> dict[str, Callable[[], Finished]]:
        """Return what runs in every round, in order, by the name of its column."""
        name = recipe.stem.partition("_")[2]
        shown: dict[str, Callable[[], Finished]] = {
            "ours": lambda: self.run(recipe, out),
            "cp": lambda: copy(recipe, out),
        }
        peer, peft, inputs = self.peer, self.peft, (self.inputs or {}).get(name)
        if peer and name in INTO:
            shown["peer"] = lambda: _peer(peer, recipe, out)
        if peft and inputs:
            script = Path(__file__).parent / "peft_peer.py"
            task = name.partition("-")[0]
            shown["peer, best"] = lambda: finish([peft, script, task, out, *inputs])
        return shown


def _peer(peer: Path, recipe: Path, out: Path) -> Finished:
    """Run the peer, which keeps merged models for the next run: it shall find none."""
    cache = recipe.with_suffix(".cache")
    shutil.rmtree(cache, ignore_errors=True)
    taken = finish([peer, recipe, out, "--lora-merge-cache", cache])
    shutil.rmtree(cache)
    return taken


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for models and outputs")
    parser.add_argument("--size", choices=("160M", "1.2B"), default="1.2B")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", action="append", help="this row only; repeatable")
    parser.add_argument("--mergekit", type=Path, help="default: beside this Python")
    parser.add_argument("--option", action="append", default=[], help="a further option of `run`")
    parser.add_argument("--peer", type=Path, help="environment that has mergekit-yaml")
    parser.add_argument("--peft", type=Path, help="environment that has peft and transformers")
    parser.add_argument("--write", action="store_true", help="append the table to RESULTS.md")
    return parser.parse_args()


def make_inputs(folder: Path, size: str) -> dict[str, tuple[Path, ...]]:
    """Make model and adapters if they are missing; return what peft needs, by recipe."""
    maker = Path(__file__).parent / "make_models.py"
    words = [sys.executable, maker, folder / size, "--size", size, "--only", "base"]
    subprocess.run([str(word) for word in words], check=True)
    small, large = (
        make_adapter(folder / size, f"adapter-{rank}", size, rank, rank) for rank in (16, 64)
    )
    for seed, name in enumerate(("one", "two")):
        make_adapter(folder / TWIN, f"adapter-{name}", TWIN, 64, seed)
    base = folder / size / "base"
    both = base, small, large
    return {"into-16": (base, small), "into-64": (base, large), "concat": both, "svd": both}


def main() -> None:
    """Make what is missing, measure, print, and write if asked to."""
    options = arguments()
    assert options.size in MODELS
    folder = options.folder.resolve()
    inputs = make_inputs(folder, options.size)
    programs = AdapterPrograms(
        ours=program(options.mergekit),
        options=tuple(options.option),
        peer=options.peer and program(options.peer / "bin" / "mergekit-yaml"),
        best=False,
        peft=options.peft and program(options.peft / "bin" / "python"),
        inputs=inputs,
    )
    rows = []
    for name, text in recipes(folder, options.size).items():
        if options.only and name not in options.only:
            continue
        recipe = folder / f"{options.size}_{name}.yaml"
        recipe.write_text(text)
        rows.append(row(name, measured(programs, recipe, options.runs)))
    head = [*HEAD, "peer", "peer / process", "peft", "peft / process"]
    kept = [i for i in range(len(head)) if i < len(HEAD) or any(cells[i] for cells in rows)]
    table = markdown([head[i] for i in kept], [[cells[i] for i in kept] for cells in rows])
    print(table)
    if options.write:
        places = {"FOLDER": options.folder, "PEER": options.peer, "PEFT": options.peft}
        command = command_line("bench_adapters.py", MERGEKIT=options.mergekit, **places)
        record(f"Adapters of {options.size} and {TWIN} models, bf16", command, table)


if __name__ == "__main__":
    main()
