"""Arithmetic on slabs that gives the same bits for every slab size.

Models are combined one after the other; reductions over the models axis are not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import atan2, sqrt
from typing import TYPE_CHECKING

from merge_kit.errors import ParameterError
from merge_kit.methods.lazy import torch
from merge_kit.methods.reductions import TINY_SQUARE

if TYPE_CHECKING:
    from torch import Tensor


def weighted_sum(rows: Tensor, weights: Sequence[float], start: Tensor | None = None) -> Tensor:
    """Return start + (w_0 rows[0] + w_1 rows[1] + ...), in order; overwrites the rows.

    Every product is rounded, then every sum: no fused operation, whose use differs between
    processors and between the body and the tail of a vector.

    Args:
        rows: (models, elements), at least one model.
        weights: One a model.
        start: (elements,), or None for zero.
    """
    total = scaled(rows[0], weights[0])
    for row, weight in zip(rows[1:], weights[1:], strict=True):
        total.add_(scaled(row, weight))
    return total if start is None else total.add_(start)


def scaled(row: Tensor, weight: float) -> Tensor:
    """Multiply a row by its weight, in place."""
    return row if weight == 1.0 else row.mul_(weight)


def row_angles(left: Tensor, right: Tensor) -> list[float | None]:
    """Return the angle between each pair of rows of two (rows, columns); None if one is zero.

    In float64; the angle of one row does not depend on how many there are. The operands stay as
    they are.
    """
    u, v = left.double(), right.double()  # of float64 these are the operands themselves
    squares = zip(_row_dots(u, u), _row_dots(v, v), strict=True)
    lengths = [(_length(uu), _length(vv)) for uu, vv in squares]
    u = u / torch.tensor([[length or 1.0] for length, _ in lengths], dtype=torch.float64)
    v = v / torch.tensor([[length or 1.0] for _, length in lengths], dtype=torch.float64)
    apart, together = u - v, u.add_(v)
    pairs = zip(_row_dots(apart, apart), _row_dots(together, together), strict=True)
    return [
        2 * atan2(sqrt(between), sqrt(beside)) if min(length) > 0 else None
        for (between, beside), length in zip(pairs, lengths, strict=True)
    ]


def _length(square: float) -> float:
    return sqrt(square) if square >= TINY_SQUARE else 0.0


def _row_dots(left: Tensor, right: Tensor) -> list[float]:
    """Return the dot product of each row, by folding the rows in halves."""
    found: list[float] = folded(left * right).tolist()
    return found


def folded(products: Tensor) -> Tensor:
    """Return the sum of each row of (rows, elements), at least one element; overwrites them.

    Rows are folded in halves: sums of libraries go another way for one row than for several, and
    at another address.
    """
    width = products.shape[1]
    while width > 1:
        half = width // 2
        products[:, :half].add_(products[:, width - half : width])
        width -= half
    return products[:, 0]


def scale_rows(rows: Tensor, factors: Sequence[float]) -> Tensor:
    """Multiply each row of (rows, columns) by its factor, in place."""
    return rows.mul_(torch.tensor(factors, dtype=rows.dtype).unsqueeze(1))


def total_weight(weights: Sequence[float], switch: str = "normalize") -> float:
    """Return the sum of weights that normalising divides by.

    Args:
        weights: One a model.
        switch: The parameter that turns normalising off, for the message.

    Raises:
        ParameterError: If they cancel: |sum| <= 1e-6 * sum of |w|.
    """
    total, mass = sum(weights), sum(abs(w) for w in weights)
    if abs(total) <= 1e-6 * mass or mass == 0:
        raise ParameterError(
            "weight",
            f"of the models sums to {total:g}, and normalising would divide by it",
            hint=f"set {switch}: false, or weights that do not cancel",
        )
    return total
