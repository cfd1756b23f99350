"""Adapters that are made, in words: their ranks, and what their factors miss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from merge_kit.plan.values import ModuleRank, Plan

_EACH = 3
"""Different ranks that are listed one by one."""

SHOWN = 8
"""Modules in the table at the end of a run."""

_DIGITS = 6
"""Of numbers about weights: more would differ between processors."""


@dataclass(frozen=True, slots=True)
class Residual:
    """What the factors of one module miss.

    Attributes:
        key: As in `ModuleRank`.
        relative: The Frobenius norm of what they miss, over that of the change.
        norm: That of the change.
    """

    key: str
    relative: float
    norm: float


def residuals(facts: Mapping[str, Mapping[str, float]]) -> list[Residual]:
    """Return what a run missed, module by module in its order.

    Args:
        facts: See `Report.facts`.
    """
    found = []
    for key, numbers in facts.items():
        norm, missed = numbers.get("norm"), numbers.get("residual")
        if norm is None or missed is None or not (isfinite(norm) and isfinite(missed)):
            continue
        relative = missed / norm if norm else 0.0
        found.append(Residual(key, _short(relative), _short(norm)))
    return found


def largest(found: Sequence[Residual], count: int) -> list[Residual]:
    """Return those that miss most of their change, the first of them first."""
    return sorted(found, key=lambda one: (-one.relative, one.key))[:count]


def ranks_line(ranks: Sequence[ModuleRank]) -> str:
    """Return the ranks in one line: `rank 16 for 12 modules, 8 for 4`."""
    counts = Counter(one.rank for one in ranks)
    most = "at most " if any(one.fitted for one in ranks) else ""
    if len(counts) > _EACH:
        low, high = min(counts), max(counts)
        return f"rank {most}{low} to {high} for {len(ranks):,} modules"
    rows = sorted(counts.items(), reverse=True)
    named = [f"{most}{rank} for {_modules(n, i)}" for i, (rank, n) in enumerate(rows)]
    return f"rank {', '.join(named)}" if named else "no modules"


def adapter_lines(plan: Plan) -> list[str]:
    """Return the ranks of each adapter that a plan makes, in one line each."""
    bounds = plan.ranks if plan.fits else [_known(one) for one in plan.ranks]
    folders = _folders(plan)
    if folders == [""]:
        return [ranks_line(bounds)]
    lines = []
    for folder in folders:
        own = [one for one in bounds if one.key.startswith(f"{folder}/")]
        lines.append(f"{folder}: {ranks_line(own)}")
    return lines


def residual_table(facts: Mapping[str, Mapping[str, float]], plan: Plan) -> list[str]:
    """Return the modules whose factors miss most of their change, and how many there are.

    Args:
        facts: See `Report.facts`.
    """
    found = residuals(facts)
    if not found:
        return []
    ranks = {one.key: str(one.rank) for one in plan.ranks}
    shown = largest(found, SHOWN)
    rows = [("missed", "rank", "module")]
    rows += [(f"{one.relative:.2%}", ranks.get(one.key, ""), one.key) for one in shown]
    wide = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"{a:>{wide[0]}}  {b:>{wide[1]}}  {c}" for a, b, c in rows]
    more = len(found) - len(shown)
    return [*lines, *([f"and {more:,} modules that miss less"] if more else []), ""]


def _folders(plan: Plan) -> list[str]:
    return list(dict.fromkeys(shard.name.rpartition("/")[0] for shard in plan.shards))


def _known(one: ModuleRank) -> ModuleRank:
    return ModuleRank(one.key, one.rank)


def _modules(count: int, place: int) -> str:
    noun = "" if place else " module" if count == 1 else " modules"
    return f"{count:,}{noun}"


def _short(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")
