"""A dense change as factors: the closest of a rank, and what they miss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import hypot, nan
from typing import TYPE_CHECKING

from merge_kit.core.tensors import BLOCK
from merge_kit.methods import truncated
from merge_kit.methods.base import Yield
from merge_kit.methods.factors import finite, rounded
from merge_kit.methods.lazy import torch
from merge_kit.methods.low_rank import balanced
from merge_kit.methods.updates import Spectrum, Work

if TYPE_CHECKING:
    from torch import Tensor

    from merge_kit.methods.base import Slab

_TILE = 4 * BLOCK
"""Elements that are in float64 at once."""


def spectrum(slab: Slab, energy: float) -> Spectrum:
    """Return the smallest rank that keeps a share of a change's energy, and its norm.

    Args:
        energy: Share of the sum of the squared singular values, in (0, 1].
    """
    matrix = slab.tensors[0].view(slab.shape)
    norm = _norm(matrix)
    if norm - norm != 0:
        return Spectrum(slab.ranks[0], nan)  # NaN is written with all directions, and counted
    values = truncated.spectrum(matrix, slab.name)
    return Spectrum(truncated.rank_of_energy(values, energy), norm)


def compressed(slab: Slab) -> Yield:
    """Return the factors a and b of a change, of the rank that the slab names, and facts."""
    matrix, (rank,) = slab.tensors[0].view(slab.shape), slab.ranks
    kept = min(rank, *slab.shape)
    if kept:
        left, values, right = truncated.truncated(matrix, kept, slab.name)
    else:
        left, values, right = (
            torch.zeros(shape, dtype=torch.float64)
            for shape in ((slab.shape[0], 0), (0,), (0, slab.shape[1]))
        )
    a, b = balanced(left, values, right, rank)
    residual = _missed(matrix, rounded(a, slab.stored_dtype), rounded(b, slab.stored_dtype))
    return Yield([a, b], [finite({"norm": _norm(matrix), "residual": residual})])


def work(shape: tuple[int, int], made: Sequence[int], *, whole: bool) -> Work:
    """Return what a truncated decomposition takes.

    Args:
        whole: Whether all singular values are looked at first.
    """
    rows, columns = shape
    rank = min(max(made, default=0), *shape)
    flops = truncated.flops(rows, columns, rank) + 2.0 * rows * columns * rank
    flops += truncated.spectrum_flops(rows, columns) if whole else 0.0
    held = 3 * rank * (rows + columns) + 3 * (_TILE + columns)
    first = truncated.spectrum_bytes(rows, columns) if whole else 0
    return Work(max(first, truncated.scratch_bytes(rows, columns, rank) + 8 * held), flops)


def _norm(matrix: Tensor) -> float:
    return hypot(*(float(torch.linalg.vector_norm(tile.double())) for _, tile in _tiles(matrix)))


def _missed(matrix: Tensor, a: Tensor, b: Tensor) -> float:
    """Return the norm of matrix - b @ a."""
    missed = 0.0
    for place, tile in _tiles(matrix):
        missed = hypot(missed, float(torch.linalg.vector_norm(tile.double() - b[place] @ a)))
    return missed


def _tiles(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield some rows of a matrix at a time."""
    step = max(1, _TILE // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        yield slice(start, start + step), matrix[start : start + step]
