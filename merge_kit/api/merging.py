"""Plans and merges from a recipe's file or from a dict."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_kit.core.sizes import parse_size
from merge_kit.engine.progress import Progress
from merge_kit.errors import CheckpointError
from merge_kit.plan.build import build_plan, package_version
from merge_kit.plan.values import Fitted, Plan, PlanInput, SideFile
from merge_kit.publish.card import model_card
from merge_kit.publish.manifest import manifest
from merge_kit.publish.side_files import write_side_files
from merge_kit.publish.staging import stage
from merge_kit.recipe.nodes import from_python, to_yaml
from merge_kit.recipe.parse import load_recipe, parse_recipe, recipe_from_mapping
from merge_kit.recipe.values import Recipe

if TYPE_CHECKING:
    from merge_kit.engine.report import Report

Size = str | int
RecipeLike = str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""Path of a YAML recipe, a mapping of the same shape, or a list of mappings: its documents."""


@dataclass(frozen=True, slots=True)
class Merge:
    """A finished merge.

    Attributes:
        output: The folder.
        plan: What was done, with the ranks that a look at the weights found.
        report: How it went: seconds, bytes, peak memory, hashes.
    """

    output: Path
    plan: Plan
    report: Report


def read_recipe(
    recipe: RecipeLike,
    *,
    overrides: Sequence[str] = (),
    seed: int | None = None,
    shard_size: Size | None = None,
) -> Recipe:
    """Return a recipe from a file's path, or from one or several mappings of the same shape."""
    if isinstance(recipe, str | Path):
        return load_recipe(Path(recipe), overrides=overrides, seed=seed, shard_size=shard_size)
    documents = [recipe] if isinstance(recipe, Mapping) else list(recipe)
    if len(documents) == 1:
        return recipe_from_mapping(
            documents[0], overrides=overrides, seed=seed, shard_size=shard_size
        )
    text = to_yaml([from_python(one, "<recipe>") for one in documents])
    return parse_recipe(text, overrides=overrides, seed=seed, shard_size=shard_size)


def plan(
    recipe: RecipeLike,
    *,
    overrides: Sequence[str] = (),
    seed: int | None = None,
    shard_size: Size | None = None,
    threads: int | None = None,
    memory: Size | None = None,
) -> Plan:
    """Return everything that a merge would do, from headers alone.

    Args:
        recipe: Path of a YAML recipe, or a dict of the same shape (a list of dicts: documents).
        overrides: "key=value" as for `--set`.
        seed: Instead of the recipe's.
        shard_size: Largest size of a shard, "5GB" or bytes, instead of the recipe's.
        threads: Workers; one for each processor by default.
        memory: Most resident memory of the whole process, "1GiB" or bytes.

    Raises:
        MergeKitError: Everything that is wrong with recipe and inputs, in one list.
    """
    read = read_recipe(recipe, overrides=overrides, seed=seed, shard_size=shard_size)
    limit = None if memory is None else parse_size(memory)
    return build_plan(read, threads=threads, memory_bytes=limit)


def merge(  # noqa: PLR0913  (every option has a name)
    recipe: RecipeLike,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    overrides: Sequence[str] = (),
    seed: int | None = None,
    shard_size: Size | None = None,
    threads: int | None = None,
    memory: Size | None = None,
    allow_nonfinite: bool = False,
    sync: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
) -> Merge:
    """Merge models into a folder, which appears whole or not at all.

    Args:
        recipe: Path of a YAML recipe, or a dict of the same shape (a list of dicts: documents).
        output: The folder; default: the recipe's `output`, else merged/<stem of the recipe>.
        overwrite: Replace an output that is there.
        allow_nonfinite: Write NaN and infinities and count them, instead of stopping.
        sync: Return only when everything is on disk.
        on_plan: Called with the plan before anything is read or written; ranks that depend on the
            weights are upper bounds in it.
        on_progress: Called with `Progress` from worker threads, one call at a time.
        stop: Set it from another thread to end early; the same call goes on from there later.

    The other arguments are those of `plan`.

    Raises:
        MergeKitError: The cause in one line or list; no output was written.
    """
    read = read_recipe(recipe, overrides=overrides, seed=seed, shard_size=shard_size)
    limit = None if memory is None else parse_size(memory)
    planned = build_plan(read, threads=threads, memory_bytes=limit)
    folder = output_folder(read, output)
    if on_plan is not None:
        on_plan(planned)
    roots = [model.root for model in planned.read]
    if isinstance(recipe, str | Path):
        roots.append(Path(recipe))  # it must not be replaced by what it makes
    with stage(folder, overwrite=overwrite, inputs=roots, identity=planned.identity) as staging:
        from merge_kit.engine.run import run_plan  # noqa: PLC0415  (torch, only when it is needed)

        if planned.fits:
            fitted = _fit(planned, staging.folder, allow_nonfinite, on_progress, stop)
            looked_at = planned.read
            planned = build_plan(read, threads=threads, memory_bytes=limit, fitted=fitted)
            _check_same(looked_at, planned.read)
        report = run_plan(
            planned,
            staging.folder,
            allow_nonfinite=allow_nonfinite,
            sync=sync,
            on_progress=on_progress,
            stop=stop,
        )
        report = _by_module(report, planned)
        write_side_files(staging.folder, planned.side_files)
        _describe(staging.folder, planned, read, report)
        staging.commit(sync=sync)
    return Merge(folder, planned, report)


def _fit(
    planned: Plan,
    folder: Path,
    allow_nonfinite: bool,
    on_progress: Callable[[Progress], None] | None,
    stop: threading.Event | None,
) -> tuple[Fitted, ...]:
    """Look at the weights for what the layout depends on, or go on doing so."""
    from merge_kit.engine.fit import fit_plan  # noqa: PLC0415  (torch, only when it is needed)

    return fit_plan(
        planned, folder, allow_nonfinite=allow_nonfinite, on_progress=on_progress, stop=stop
    )


def _check_same(before: Sequence[PlanInput], after: Sequence[PlanInput]) -> None:
    """Refuse inputs that are not those whose weights were looked at."""
    for one, other in zip(before, after, strict=True):
        if one.files != other.files:
            problem = "changed while its weights were looked at"
            raise CheckpointError(problem, where=one.text, hint="leave it alone and run again")


def _by_module(report: Report, planned: Plan) -> Report:
    """Return a report whose facts go by modules instead of tensors."""
    modules = {rank.tensor: rank.key for rank in planned.ranks if rank.tensor}
    facts = {modules.get(key, key): found for key, found in report.facts.items()}
    return replace(report, facts=facts)


def output_folder(recipe: Recipe, output: str | Path | None = None) -> Path:
    """Return where a recipe's output goes."""
    if output is not None:
        return Path(output)
    if recipe.output is not None:
        return Path(recipe.output)
    return Path("merged") / Path(recipe.source.strip("<>")).stem


def _describe(folder: Path, planned: Plan, recipe: Recipe, report: Report) -> None:
    """Write the model card and the manifest."""
    from merge_kit.engine.versions import versions  # noqa: PLC0415

    text = manifest(
        planned,
        recipe_text=recipe.text,
        hashes=report.hashes,
        nonfinite=report.nonfinite,
        saturated=report.saturated,
        facts=report.facts,
        orders=report.orders,
        versions={"merge_kit": package_version("merge_kit"), **versions()},
    )
    card = model_card(
        planned,
        recipe_text=recipe.text,
        nonfinite=report.nonfinite,
        facts=report.facts,
        orders=report.orders,
    )
    files = [SideFile("merge_kit.json", text=text), SideFile("README.md", text=card)]
    write_side_files(folder, files)
