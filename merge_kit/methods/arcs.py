"""Arcs between pairs of vectors: angles, the factors of both ends, many short vectors at once."""

from __future__ import annotations

from collections.abc import Iterator
from math import atan2, sin, sqrt
from typing import TYPE_CHECKING

from merge_kit.core.tensors import BLOCK
from merge_kit.methods import ops
from merge_kit.methods.lazy import torch
from merge_kit.methods.reductions import TINY_SQUARE

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 8192
"""Elements of one vector that are summed together; fixed, so that sums have one order."""

MOST_VECTORS = 4096
"""Vectors that are looked at together, at most."""

SCRATCH_BYTES = 88 * BLOCK
"""Bytes that `turn` takes, at most: ten runs of a block in float64, and a list of angles."""


def coefficients(theta: float | None, t: float) -> tuple[float, float]:
    """Return the factors of both ends of an arc of angle theta, at t.

    Linear for zero vectors (theta None), and where sin(theta) <= 1e-6 (parallel or opposite).
    """
    if theta is None or sin(theta) <= 1e-6:
        return 1 - t, t
    return sin((1 - t) * theta) / sin(theta), sin(t * theta) / sin(theta)


def turn(left: Tensor, right: Tensor, t: float) -> Tensor:
    """Move each vector along the arc to its partner, in place; return left.

    Args:
        left: (vectors, elements), at any strides.
        right: Of the same shape, overwritten too.
        t: 0 gives left, 1 right.
    """
    for rows in groups(*left.shape):
        one, other = left[rows], right[rows]
        factors = torch.tensor(
            [coefficients(theta, t) for theta in angles(one, other)], dtype=left.dtype
        )
        one.mul_(factors[:, :1]).add_(other.mul_(factors[:, 1:]))
    return left


def groups(vectors: int, elements: int, most: int = MOST_VECTORS) -> Iterator[slice]:
    """Yield runs of vectors whose pieces together are at most a block."""
    count = max(1, min(most, BLOCK // max(1, min(elements, PIECE))))
    for first in range(0, vectors, count):
        yield slice(first, first + count)


def angles(left: Tensor, right: Tensor) -> list[float | None]:
    """Return the angle of each pair of vectors of two (vectors, elements); None if one is zero.

    In float64; the angle of one pair does not depend on how many there are.
    """
    lengths = [_lengths(vectors) for vectors in (left, right)]
    apart = together = torch.zeros(len(left), dtype=torch.float64)
    for u, v in zip(pieces(left), pieces(right), strict=True):
        one, other = (x / length.unsqueeze(1) for x, length in zip((u, v), lengths, strict=True))
        apart = apart + ops.folded((one - other).square_())
        together = together + ops.folded(one.add_(other).square_())
    found = zip(apart.tolist(), together.tolist(), *(x.tolist() for x in lengths), strict=True)
    return [
        2 * atan2(sqrt(between), sqrt(beside)) if max(one, other) < float("inf") else None
        for between, beside, one, other in found
    ]


def _lengths(vectors: Tensor) -> Tensor:
    """Return the length of each vector, infinity where it is too small to have a direction."""
    squares = torch.zeros(len(vectors), dtype=torch.float64)
    for piece in pieces(vectors):
        squares = squares + ops.folded(piece * piece)
    return torch.where(squares < TINY_SQUARE, torch.inf, squares.sqrt())


def pieces(vectors: Tensor) -> Iterator[Tensor]:
    """Yield copies of pieces of all vectors in float64, (vectors, at most PIECE)."""
    for at in range(0, vectors.shape[1], PIECE):
        yield vectors[:, at : at + PIECE].to(torch.float64, copy=True)
