"""`mergekit run`."""

from __future__ import annotations

import gc
import importlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_kit import api
from merge_kit.api.merging import RecipeLike
from merge_kit.cli import extraction_table
from merge_kit.cli.options import Planning
from merge_kit.cli.planning import output_of, print_summary
from merge_kit.cli.progress import Bar, Lines, Quiet
from merge_kit.cli.signals import Stop
from merge_kit.cli.streams import complain
from merge_kit.cli.text import print_json_line
from merge_kit.core.sizes import format_size
from merge_kit.errors import InterruptedRun
from merge_kit.plan.describe import counts_line, generated_count, plural
from merge_kit.plan.describe_adapters import residual_table, residuals
from merge_kit.plan.describe_orders import Orders, order_lines
from merge_kit.plan.values import Plan


@dataclass(frozen=True, slots=True)
class Choices:
    """What the user chose for one run.

    Attributes:
        as_json: Whether standard output is one JSON object.
        json_progress: Whether standard output is lines of JSON, the last one that object.
    """

    overwrite: bool
    allow_nonfinite: bool
    sync: bool
    as_json: bool
    json_progress: bool

    @property
    def speaks_json(self) -> bool:
        return self.as_json or self.json_progress


def run_recipe(recipe: Path, output: Path | None, choices: Choices, planning: Planning) -> None:
    """Plan, say so, merge, and say what was done."""
    run_into(recipe, output_of(recipe, planning, output), choices, planning)


def run_into(recipe: RecipeLike, place: Path, choices: Choices, planning: Planning) -> None:
    """Run a recipe whose output goes to a place, and say so."""
    merge = _merge(recipe, place, choices, planning)
    if choices.speaks_json:
        print_json_line(_result(merge))
    else:
        print("\n".join(_closing_lines(merge)))
    _warn("NaN or infinities", merge.report.nonfinite)
    _warn("values beyond the output dtype", merge.report.saturated)


def _load_engine() -> None:
    """Load torch without collecting garbage between its modules, none of which is any."""
    gc.disable()
    try:
        importlib.import_module("merge_kit.engine.run")
        gc.freeze()
    finally:
        gc.enable()


def _merge(recipe: RecipeLike, place: Path, choices: Choices, planning: Planning) -> api.Merge:
    def show(plan: Plan) -> None:
        if not choices.speaks_json:
            print_summary(plan, place)
            print(flush=True)
        _load_engine()

    progress = Lines() if choices.json_progress else Quiet() if choices.as_json else Bar()
    with Stop() as stop, progress:
        try:
            return api.merge(
                recipe,
                place,
                overwrite=choices.overwrite,
                allow_nonfinite=choices.allow_nonfinite,
                sync=choices.sync,
                on_plan=show,
                on_progress=progress.show,
                stop=stop.event,
                **planning,
            )
        except InterruptedRun as exc:
            hint = exc.hint or "run the same command again to go on from here"
            raise InterruptedRun(stop.signal or exc.signal, where=exc.where, hint=hint) from exc


def _result(merge: api.Merge) -> dict[str, Any]:
    merged, copied, dropped = merge.plan.counts()
    report, generated = merge.report, generated_count(merge.plan)
    missed = {"missed": extraction_table.as_json(merge)} if _extracts(merge) else {}
    ranks = {"ranks": {one.key: one.rank for one in merge.plan.ranks}} if merge.plan.ranks else {}
    found = {one.key: one.relative for one in residuals(report.facts)}
    return {
        "output": str(merge.output),
        "seconds": report.seconds,
        "merged": merged - generated,
        **({"generated": generated} if generated else {}),
        "copied": copied,
        "dropped": dropped,
        "peak_bytes": report.peak_bytes,
        "bytes_read": report.bytes_read,
        "bytes_written": report.bytes_written,
        **ranks,
        **({"residuals": found} if found else {}),
        **({"orders": _orders(report.orders)} if report.orders else {}),
        **missed,
    }


def _orders(orders: Orders) -> dict[str, list[int]]:
    return {where: [expert for expert, _ in pairs] for where, pairs in orders.items()}


def _closing_lines(merge: api.Merge) -> list[str]:
    report, plan = merge.report, merge.plan
    moved = report.bytes_read + report.bytes_written
    rate = format_size(round(moved / report.seconds)) if report.seconds > 0 else "-"
    peak, promised = format_size(report.peak_bytes), format_size(plan.bill.peak_bytes)
    made = residual_table(report.facts, plan)
    missed = extraction_table.lines(merge) if _extracts(merge) else made
    resumed = [f"went on from an earlier run that had finished {report.resumed:,} steps"]
    return [
        *missed,
        *order_lines(report.orders),
        counts_line(plan),
        *(resumed if report.resumed else []),
        f"{report.seconds:.1f} s, {rate}/s read and written, peak memory {peak} of {promised}",
        f"output: {merge.output}",
        f"verify: mergekit verify {shlex.quote(str(merge.output))}",
    ]


def _extracts(merge: api.Merge) -> bool:
    return merge.plan.method == extraction_table.METHOD


def _warn(what: str, counts: Mapping[str, int]) -> None:
    """Say on standard error which tensors hold what was allowed but is seldom wanted."""
    if counts:
        total, first = sum(counts.values()), next(iter(counts))
        place = f"{plural(len(counts), 'tensor')}, the first is {first}"
        complain(f"warning: {total:,} {what} in {place}")
