"""The factors of adapters as sources: matrices, scaled, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from math import frexp, prod, sqrt

from merge_kit.io.adapter_values import Update
from merge_kit.plan.sources import (
    Columns,
    Concat,
    LowRank,
    Rows,
    Source,
    Sum,
    Transposed,
    View,
    of_file,
)


def matrix(source: Source) -> Source:
    """Return a source as a matrix: its first axis, and all others as one."""
    shape = source.shape
    return source if len(shape) == 2 else View(source, 0, (shape[0], prod(shape[1:])))


def scaled(source: Source, factor: float) -> Source:
    """Return a source times a factor, itself where that is 1."""
    return source if factor == 1 else Sum(((factor, source),))


def is_exact(factor: float) -> bool:
    """Return whether a product by this factor is not rounded: a power of two, or its negative."""
    return abs(frexp(factor)[0]) == 0.5


def halved(ratio: float) -> tuple[float, float]:
    """Return a power of two for a, and what is left of a ratio below 1 for b.

    float16 has few numbers near 0, so that a small ratio in one factor alone would cost digits.
    """
    share = 2.0 ** (frexp(ratio)[1] // 2) if ratio else 1.0
    return share, ratio / share


def stacked_a(updates: Sequence[Update], factors: Sequence[float]) -> Source:
    """Return the a of updates one below the other, each times a factor, expert by expert."""
    first = updates[0]
    scaled_ones = [scaled(of_file(u.a), f) for u, f in zip(updates, factors, strict=True)]
    if len(updates) == 1:
        return scaled_ones[0]
    joined = Concat(tuple(scaled_ones))
    return Rows(joined, _expert_rows(updates)) if first.experts > 1 else joined


def _expert_rows(updates: Sequence[Update]) -> tuple[int, ...]:
    """Return the rows of a's in turn that make one with the ranks of each expert together."""
    starts, at = [], 0
    for update in updates:
        starts.append(at)
        at += update.rank * update.experts
    return tuple(
        start + expert * update.rank + rank
        for expert in range(updates[0].experts)
        for start, update in zip(starts, updates, strict=True)
        for rank in range(update.rank)
    )


def stacked_b(updates: Sequence[Update], factors: Sequence[float]) -> Source:
    """Return the b of updates side by side, each times a factor, in the axes that b has.

    The columns of experts are by rank first, so that they need no other order.
    """
    scaled_ones = [scaled(of_file(u.b), f) for u, f in zip(updates, factors, strict=True)]
    if len(updates) == 1:
        return scaled_ones[0]
    beside = Columns(tuple(matrix(one) for one in scaled_ones))
    axes = updates[0].b.spec.shape[2:]
    return View(beside, 0, (*beside.shape, *axes)) if axes else beside


def factor_pair(update: Update, *, splits: bool) -> tuple[Source, Source]:
    """Return a and b as matrices with the scale in b, or its root in both.

    Args:
        splits: Whether both take the root of the scale, and a its sign, as in peft.
    """
    a, b = matrix(of_file(update.a)), matrix(of_file(update.b))
    if not splits:
        return a, scaled(b, update.scale)
    root = sqrt(abs(update.scale))
    return scaled(a, -root if update.scale < 0 else root), scaled(b, root)


def formed(update: Update) -> LowRank:
    """Return the change in the shape and the orientation of the weight in a full model."""
    a, b = matrix(of_file(update.a)), matrix(of_file(update.b))
    if update.kind == "embedding" or update.transposed:
        turned = (a.shape[1], b.shape[0])
        return LowRank(None, Transposed(b), Transposed(a), update.scale, turned)
    shape = (b.shape[0], *update.a.spec.shape[1:])
    return LowRank(None, a, b, update.scale, shape)


def upright(source: Source, update: Update) -> Source:
    """Return a change as the matrix (outputs, inputs) that b @ a is; the inverse of `formed`."""
    if update.kind == "embedding" or update.transposed:
        return Transposed(source)
    return matrix(source)
