"""Sums of vectors of very different lengths, and the factors that such sums take."""

from __future__ import annotations

from collections.abc import Sequence
from math import frexp, ldexp
from typing import TYPE_CHECKING

from merge_kit.methods import ops

if TYPE_CHECKING:
    from torch import Tensor

_LEAST, _MOST = 1e-30, 1e30  # factors that float32 takes at once


def weighted_sum(rows: Tensor, factors: Sequence[float], start: Tensor | None = None) -> Tensor:
    """Return start + (f_0 rows[0] + f_1 rows[1] + ...), in order; overwrites the rows.

    As `ops.weighted_sum`, but for factors of any size, also those that float32 does not hold:
    what gives a short vector the length of a long one.

    Args:
        rows: (models, elements), at least one model.
        factors: One a model.
        start: (elements,), or None for zero.
    """
    total = times(rows[0], factors[0])
    for row, factor in zip(rows[1:], factors[1:], strict=True):
        total.add_(times(row, factor))
    return total if start is None else total.add_(start)


def times(row: Tensor, factor: float) -> Tensor:
    """Multiply a row by a factor, in place; in two steps if it is very large or very small."""
    if factor == 1.0:
        return row
    if factor == 0.0 or _LEAST <= abs(factor) <= _MOST:
        return row.mul_(factor)
    half = ldexp(1.0, frexp(factor)[1] // 2)
    return row.mul_(half).mul_(factor / half)


def shares(weights: Sequence[float], switch: str) -> list[float]:
    """Return weights divided by their sum.

    Args:
        weights: One a model.
        switch: The parameter that turns this off, for the message.

    Raises:
        ParameterError: If they cancel: |sum| <= 1e-6 * sum of |w|.
    """
    total = ops.total_weight(weights, switch)
    return [w / total for w in weights]
