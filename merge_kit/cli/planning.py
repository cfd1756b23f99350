"""`mergekit plan`, and what `mergekit run` prints before it starts."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from merge_kit import api
from merge_kit.cli.options import Planning
from merge_kit.cli.text import print_json, table
from merge_kit.plan.describe import summary
from merge_kit.plan.describe_json import plan_json
from merge_kit.plan.describe_steps import layer_lines, rule_lines
from merge_kit.plan.values import Plan


def show_plan(
    recipe: Path,
    planning: Planning,
    *,
    output: Path | None = None,
    layers: bool = False,
    rules: bool = False,
    as_json: bool = False,
) -> None:
    """Print a plan: as a table, with the maps that are asked for, or everything as JSON."""
    plan = api.plan(recipe, **planning)
    if as_json:
        print_json(plan_json(plan))
        return
    print_summary(plan, output_of(recipe, planning, output))
    if layers:
        print("\n" + "\n".join(layer_lines(plan)))
    if rules:
        print("\n" + "\n".join(rule_lines(plan) or ["no tensors"]))


def print_summary(plan: Plan, output: Path) -> None:
    """Print the table of what a run does and takes."""
    print(table(summary(plan, free_bytes(output))))


def output_of(recipe: Path, planning: Planning, output: Path | None) -> Path:
    """Return where the output goes: as the user says, or as the recipe says."""
    return api.output_folder(api.read_recipe(recipe, overrides=planning["overrides"]), output)


def free_bytes(place: Path) -> int | None:
    """Return the free space of the disk that holds a path, or would; None if nothing tells."""
    with suppress(OSError):  # a name too long, say: the run says so in its words
        for folder in (place, *place.absolute().parents):
            if folder.exists():
                return shutil.disk_usage(folder).free
    return None
