"""A block Krylov space: what a matrix maps to most, from a block of random vectors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING

from merge_kit.methods import noise
from merge_kit.methods.lazy import torch
from merge_kit.methods.tiles import norm

if TYPE_CHECKING:
    from torch import Tensor

_STEPS = 500
"""Blocks of a space, at most; real matrices take from 3 to 30."""

_GROWTH = 2e-4
"""A space is done when a block captures no more than this share of what is left."""

_NOTHING = 1e-13
"""This share of a matrix's squared norm is nothing: float32 does not hold more of it."""


def block(rank: int) -> int:
    """Return the vectors of one block: products of few are slow, of many more than is needed."""
    return max(16, -(-rank // 2))


def most(small: int, rank: int) -> int:
    """Return how many vectors a space may have before it starts again from its best."""
    return min(small // 2, rank + 16 * block(rank))


def krylov(matrix: Tensor, rank: int, name: str) -> Tensor:
    """Return an orthonormal basis (rows, rank and more) of what the matrix maps to most.

    A space that has grown large goes on from the best that it holds.
    """
    rows, columns = matrix.shape
    width = block(rank)
    energy = norm(matrix) ** 2
    start = noise.normal(("truncated", name), 0, columns * width).view(columns, width)
    found, captured = _like(matrix, start), -1.0
    left, known = (torch.empty(size, 0, dtype=torch.float64) for size in (rows, columns))
    for step in count():
        more = _directions(found, left, _fresh(name, rows, width, step))
        right = (matrix.T @ more.to(matrix.dtype)).double()
        left, known = torch.cat([left, more], 1), torch.cat([known, right], 1)
        values, vectors = torch.linalg.eigh(known.T @ known)
        before, captured = captured, float(values[-rank:].sum())
        best = vectors[:, -(rank + width) :]
        rest = max(energy - captured, _NOTHING * energy)
        is_done = left.shape[1] >= rank + width and captured - before <= _GROWTH * rest
        if is_done or step == _STEPS:
            break
        if left.shape[1] >= most(rows, rank):
            left, known = left @ best, known @ best
        found = _like(matrix, right)
    basis: Tensor = left @ best
    return basis


def _like(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Return the product, made in the matrix's dtype, in float64."""
    return (matrix @ vectors.to(matrix.dtype)).double()


def _fresh(name: str, rows: int, block: int, step: int) -> Callable[[], Tensor]:
    """Return what makes random directions, for spaces that grow no more."""

    def made() -> Tensor:
        drawn = noise.normal(("truncated", name, "fresh", step), 0, rows * block)
        return drawn.double().view(rows, block)

    return made


def _directions(found: Tensor, known: Tensor, fresh: Callable[[], Tensor]) -> Tensor:
    """Return orthonormal directions of `found` that are orthogonal to the known ones.

    Where it has none left (the matrix has a lower rank), random ones take their place.
    """
    size = float(found.norm())
    basis, triangle = torch.linalg.qr(_without(found, known))
    weak = triangle.diagonal().abs() <= 1e-9 * size
    if bool(weak.any()):
        basis[:, weak] = fresh()[:, weak]
    clean: Tensor = torch.linalg.qr(_without(basis, known))[0]
    return clean


def _without(vectors: Tensor, known: Tensor) -> Tensor:
    """Return vectors less their parts in the known directions, which rounding makes twice."""
    for _ in range(2):
        vectors = vectors - known @ (known.T @ vectors)
    return vectors
