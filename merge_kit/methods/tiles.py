"""Products of large matrices in float64, a tile at a time, and their norm."""

from __future__ import annotations

from collections.abc import Iterator
from math import hypot
from typing import TYPE_CHECKING

from merge_kit.core.tensors import BLOCK
from merge_kit.methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

TILE = 16 * BLOCK
"""Elements that are in float64 at once."""


def norm(matrix: Tensor) -> float:
    """Return the Frobenius norm of a matrix, in float64, without a copy of it."""
    return hypot(*(float(torch.linalg.vector_norm(tile)) for _, tile in tiles(matrix)))


def tiles(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield columns of a matrix in float64, a tile at a time."""
    step = max(1, TILE // max(1, matrix.shape[0]))
    for start in range(0, matrix.shape[1], step):
        place = slice(start, start + step)
        yield place, matrix[:, place].double()


def times(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Return matrix @ vectors in float64, for a tall matrix."""
    out = torch.empty(matrix.shape[0], vectors.shape[1], dtype=torch.float64)
    for place, tile in tiles(matrix.T):
        torch.mm(tile.T, vectors, out=out[place])
    return out


def gram(matrix: Tensor) -> Tensor:
    """Return matrix @ its transpose in float64."""
    found = torch.zeros(matrix.shape[0], matrix.shape[0], dtype=torch.float64)
    for _, tile in tiles(matrix):
        found.addmm_(tile, tile.T)
    return found
