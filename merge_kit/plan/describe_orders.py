"""Experts that were put in another order, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merge_kit.plan.describe import plural

Orders = Mapping[str, Sequence[tuple[int, float]]]
"""Experts (model and module) -> for each place, which expert stands there now, and how far it is
from the one that it was matched with, relative to that one; see `Report.orders`."""

SHOWN = 3
"""Models that are listed before `and 12 more`."""


def order_lines(orders: Orders) -> list[str]:
    """Return one line a model: how many experts moved, and how far matched ones are apart."""
    models: dict[str, list[Sequence[tuple[int, float]]]] = {}
    for where, pairs in orders.items():
        models.setdefault(where.rpartition(", ")[0], []).append(pairs)
    lines = [f"{model}: {_line(blocks)}" for model, blocks in models.items()]
    more = len(lines) - SHOWN
    return [*lines[:SHOWN], *([f"and {plural(more, 'model')} more"] if more > 0 else [])]


def _line(blocks: Sequence[Sequence[tuple[int, float]]]) -> str:
    pairs = [pair for block in blocks for pair in block]
    moved = sum(place != e for block in blocks for place, (e, _) in enumerate(block))
    apart = apart_line([distance for _, distance in pairs])
    layers = plural(len(blocks), "layer")
    return f"{moved:,} of {len(pairs):,} experts in {layers} moved; matched ones are {apart} apart"


def apart_line(distances: Sequence[float]) -> str:
    """Return the range of distances, as shares of the experts' lengths."""
    low, high = (f"{edge:.2%}" for edge in (min(distances), max(distances)))
    return low if low == high else f"{low} to {high}"
