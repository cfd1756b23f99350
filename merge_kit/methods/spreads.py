"""How large the elements of tensors are: root mean square and standard deviation."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt
from typing import TYPE_CHECKING, Any

from merge_kit.methods.lazy import torch
from merge_kit.methods.reductions import Accumulator, Done, Reduction, wide_blocks

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

    from merge_kit.methods.reductions import Place, Rows

CONSTANT = 1e-12
"""Ratio of deviation and root mean square up to which elements count as all equal."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Of the elements of one row; NaN if they are not finite, 0.0 if there are none.

    Also 0.0 where squares do not fit float64.

    Attributes:
        norm: Square root of the sum of squares.
        std: Root mean squared deviation from the mean, 0.0 where all are equal.
    """

    norm: float
    std: float


@dataclass(frozen=True, slots=True)
class Spreads(Reduction):
    """The `Spread` of each of the k rows that are scanned, as a tuple.

    The deviations of a block are taken from its own mean, so that small ones around a large mean
    keep their digits.
    """

    def accumulator(self, carry: Any) -> Accumulator:
        """Return one that has seen nothing."""
        del carry
        return _Moments()

    def finish(self, total: Any, carry: Any) -> Done:
        """Return what was found."""
        del carry
        return Done(tuple(_spread(*row) for row in total.rows))


class _Moments(Accumulator):
    """Of each row: elements, mean, and the sum of squared deviations from it."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, float, float]] = []

    def add(self, values: Rows, place: Place) -> None:
        del place
        for wide in wide_blocks(values):
            self._plus([_moments(row) for row in wide])

    def absorb(self, later: Self) -> None:
        if later.rows:
            self._plus(later.rows)

    def _plus(self, more: list[tuple[int, float, float]]) -> None:
        if self.rows:
            more = [_joined(*pair) for pair in zip(self.rows, more, strict=True)]
        self.rows = more


def _moments(block: Tensor) -> tuple[int, float, float]:
    """Return those of one block; overwrites it."""
    count = block.numel()
    mean = float(block.sum()) / max(count, 1)
    block.sub_(mean)
    return count, mean, float(torch.dot(block, block))


def _joined(
    left: tuple[int, float, float], right: tuple[int, float, float]
) -> tuple[int, float, float]:
    """Return the moments of two runs together."""
    count = left[0] + right[0]
    if not left[0] or not right[0]:
        return left if left[0] else right
    apart = right[1] - left[1]
    mean = left[1] + apart * (right[0] / count)
    return count, mean, left[2] + right[2] + apart**2 * (left[0] * right[0] / count)


def _spread(count: int, mean: float, squares: float) -> Spread:
    if not count or squares == inf:
        return Spread(0.0, 0.0)
    norm, std = sqrt(squares + mean * mean * count), sqrt(squares / count)
    return Spread(norm, std if std > CONSTANT * norm / sqrt(count) else 0.0)
