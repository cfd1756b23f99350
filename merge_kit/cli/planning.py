"""`mergekit plan`, and what `mergekit run` prints before it starts."""

from __future__ import annotations

import shutil
import stat
from contextlib import suppress
from pathlib import Path

from merge_kit import api
from merge_kit.cli.options import Planning
from merge_kit.cli.text import print_json, table
from merge_kit.errors import UsageError
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
    place = Path() if output is None and is_pipe(recipe) else output_of(recipe, planning, output)
    print_summary(plan, place)
    if layers:
        print("\n" + "\n".join(layer_lines(plan)))
    if rules:
        print("\n" + "\n".join(rule_lines(plan) or ["no tensors"]))


def print_summary(plan: Plan, output: Path) -> None:
    """Print the table of what a run does and takes."""
    print(table(summary(plan, free_bytes(output))))


def output_of(recipe: Path, planning: Planning, output: Path | None) -> Path:
    """Return where the output goes: as the user says, or as the recipe says.

    Raises:
        UsageError: If nobody says, because the recipe comes from a pipe and is read only once.
    """
    if output is not None:
        return output
    if is_pipe(recipe):
        raise UsageError("the recipe comes from a pipe", hint="name the output's folder with -o")
    return api.output_folder(api.read_recipe(recipe, overrides=planning["overrides"]), output)


def is_pipe(recipe: Path) -> bool:
    """Return whether a recipe can be read only once: `mergekit run <(make_recipe)`."""
    try:
        mode = recipe.stat().st_mode
    except OSError:  # not there, or no name for a file: the reader says so
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def free_bytes(place: Path) -> int | None:
    """Return the free space of the disk that holds a path, or would; None if nothing tells."""
    with suppress(OSError):  # a name too long, say: the run says so in its words
        for folder in (place, *place.absolute().parents):
            if folder.exists():
                return shutil.disk_usage(folder).free
    return None
