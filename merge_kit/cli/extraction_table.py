"""What an extracted adapter misses of the model: by module, by layer, in all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import hypot
from typing import Any

from merge_kit import api
from merge_kit.architecture.stacks import outermost
from merge_kit.cli.text import columns
from merge_kit.core.names import natural_key

SHOWN = 20
"""Modules in the table; JSON has all."""

METHOD = "lora_extract"
"""What extracts an adapter."""


@dataclass(frozen=True, slots=True)
class Miss:
    """What factors miss of a change: of a module, of a layer, or of all.

    Attributes:
        name: Of the module or layer.
        modules: How many there are.
        rank: Of the module; the largest of several.
        norm: Frobenius norm of the change.
        residual: Frobenius norm of what the factors miss of it.
    """

    name: str
    modules: int
    rank: int
    norm: float
    residual: float

    @property
    def share(self) -> float:
        """What is missed, relative to the change."""
        return self.residual / self.norm if self.norm else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        numbers = {"norm": self.norm, "residual": self.residual, "share": self.share}
        short = {key: float(f"{value:.6g}") for key, value in numbers.items()}
        return {"name": self.name, "modules": self.modules, "rank": self.rank, **short}


def lines(merge: api.Merge) -> list[str]:
    """Return the table, the largest misses first."""
    modules = _modules(merge)
    if not modules:
        return []
    largest = sorted(modules, key=lambda one: -one.share)[:SHOWN]
    more = len(modules) - len(largest)
    cells = [("missed", "rank", "norm", "module"), *(_cells(one) for one in largest)]
    found = columns(cells).splitlines()
    found += [f"and {more:,} modules that miss less"] if more else []
    layers = _layers(modules)
    if len(layers) > 1:
        heads = [("missed", "rank", "norm", "layer"), *(_cells(one) for one in layers)]
        found += ["", *columns(heads).splitlines()]
    total = _total("all", modules)
    squares = f"{total.share**2:.2%} of its squares, which energy counts"
    last = f"{total.share:.2%} of the change of {total.modules:,} modules is missed ({squares})"
    found += ["", last, ""]
    return found


def as_json(merge: api.Merge) -> dict[str, Any]:
    """Return all of it as JSON."""
    modules = _modules(merge)
    return {
        "modules": [one.as_json() for one in modules],
        "layers": [one.as_json() for one in _layers(modules)],
        "total": _total("all", modules).as_json(),
    }


def _cells(miss: Miss) -> tuple[str, str, str, str]:
    return f"{miss.share:.2%}", str(miss.rank), f"{miss.norm:.4g}", miss.name


def _modules(merge: api.Merge) -> list[Miss]:
    facts = merge.report.facts
    return [
        Miss(one.key, 1, one.rank, facts[one.key]["norm"], facts[one.key]["residual"])
        for one in merge.plan.ranks
        if {"norm", "residual"} <= facts.get(one.key, {}).keys()
    ]


def _layers(modules: Sequence[Miss]) -> list[Miss]:
    """Return what each layer misses, in order; what belongs to none comes last."""
    groups: dict[str, list[Miss]] = {}
    for one in modules:
        place = outermost(one.name)
        layer = "outside layers" if place is None else f"{place[0]}.{place[1]}"
        groups.setdefault(layer, []).append(one)
    named = (_total(layer, members) for layer, members in groups.items())
    return sorted(named, key=lambda one: (one.name == "outside layers", natural_key(one.name)))


def _total(name: str, members: Sequence[Miss]) -> Miss:
    norm, residual = (hypot(*_numbers(members, field)) for field in ("norm", "residual"))
    return Miss(name, len(members), max((one.rank for one in members), default=0), norm, residual)


def _numbers(members: Sequence[Miss], field: str) -> Iterator[float]:
    return (getattr(one, field) for one in members)
