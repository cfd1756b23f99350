"""`mergekit verify`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from merge_kit import api
from merge_kit.cli.text import print_json
from merge_kit.errors import CheckpointError
from merge_kit.plan.describe import plural
from merge_kit.publish.manifest import read_manifest
from merge_kit.publish.recipes import recipe_hash
from merge_kit.publish.verify import Verification, verify


@dataclass(frozen=True, slots=True)
class Origin:
    """A recipe that an output should come from, with what the command line changed in it."""

    recipe: Path
    overrides: tuple[str, ...]
    seed: int | None


def show_verification(out: Path, origin: Origin | None, *, as_json: bool) -> None:
    """Print whether a merge is as it was written, and comes from a recipe if one is given.

    Raises:
        click.exceptions.Exit: With the code of a broken input, if anything differs.
    """
    found = verify(out)
    differences = [] if origin is None else list(recipe_differences(out, origin))
    if as_json:
        print_json(_as_json(found, differences))
    else:
        print("\n".join(_lines(found, differences, checked_recipe=origin is not None)))
    if differences or not found.is_intact:
        raise click.exceptions.Exit(CheckpointError.exit_code)


def recipe_differences(out: Path, origin: Origin) -> Iterator[str]:
    """Yield how a recipe differs from the one in a merge's record."""
    record = read_manifest(out)
    recipe = api.read_recipe(origin.recipe, overrides=origin.overrides, seed=origin.seed)
    if recipe_hash(recipe.text) != record.recipe_hash:
        yield f"{origin.recipe} is another recipe than the recorded one"
    if recipe.seed != record.seed:
        yield f"{origin.recipe} has seed {recipe.seed}, the record has seed {record.seed}"


def _as_json(found: Verification, differences: Sequence[str]) -> dict[str, object]:
    return {
        "intact": found.is_intact and not differences,
        "ok": len(found.ok),
        "differing": list(found.differing),
        "missing": list(found.missing),
        "unexpected": list(found.unexpected),
        "files": list(found.files),
        "recipe": list(differences),
    }


def _lines(
    found: Verification, differences: Sequence[str], *, checked_recipe: bool
) -> Iterator[str]:
    yield f"as written: {plural(len(found.ok), 'tensor')}"
    for what, names in (
        ("other bytes", found.differing),
        ("missing", found.missing),
        ("unexpected", found.unexpected),
    ):
        if names:
            yield f"{what}: {plural(len(names), 'tensor')}"
            yield from (f"  {name}" for name in names)
    if found.files:
        yield f"files: {plural(len(found.files), 'problem')}"
        yield from (f"  {problem}" for problem in found.files)
    if checked_recipe:
        yield "recipe: differs" if differences else "recipe: the same"
        yield from (f"  {difference}" for difference in differences)
    yield "intact" if found.is_intact and not differences else "not intact"
