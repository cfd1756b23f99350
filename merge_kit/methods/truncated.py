"""The largest singular values of a dense matrix and their vectors; all of its singular values.

Few values of a large matrix come from a block Krylov space: a block of random vectors, the same in
every run, is multiplied by the matrix again and again, until what the space captures of the matrix
grows no more (`methods.krylov`). Sources: Halko, Martinsson and Tropp 2011, Finding structure with
randomness, https://arxiv.org/abs/0909.4061; Musco and Musco 2015, Randomized block Krylov methods,
https://arxiv.org/abs/1504.05477.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge_kit.errors import SolveError
from merge_kit.methods.krylov import block, krylov, most
from merge_kit.methods.lazy import torch
from merge_kit.methods.low_rank import rank_of
from merge_kit.methods.tiles import TILE, gram, times

if TYPE_CHECKING:
    from torch import Tensor

    Factors = tuple[Tensor, Tensor, Tensor]
    """u (rows, rank), s (rank,) falling, vh (rank, columns): float64, orthonormal u and vh."""

SMALL = 256
"""Matrices with no more rows, or no more columns, are decomposed whole."""

MANY = 8
"""So is a share of one in so many of all singular values, or more."""

ROUNDING = 2.0**-23
"""Singular values below this share of the largest are rounding of float32."""


_SEPARATE = 1e-8
"""Eigenvalues of a Gram matrix above this share of the largest have vectors that the matrix maps to
orthogonal ones, to 1e-8 or so."""

_WORK = 1 << 20
"""Numbers that BLAS and LAPACK keep for themselves, about."""


_RANGE = 1e12
"""Matrices whose largest element is further from 1 are scaled: their squares leave float32."""


def truncated(matrix: Tensor, rank: int, name: str) -> Factors:
    """Return the largest singular values of a matrix with their vectors.

    What u @ diag(s) @ vh misses is, in the Frobenius norm, at most 1.001 times what the best
    matrix of this rank misses, and 1e-6 of the matrix's norm, for products are in float32. Of
    each column of u the largest element is positive. Nothing here depends on the number of
    threads, if torch itself runs one.

    Args:
        matrix: (rows, columns), float32 or float64; it is left as it is.
        rank: From 1 to min(rows, columns).
        name: The tensor: it keys the random vectors, and messages show it.

    Returns:
        Float64; NaN throughout if the matrix is not finite.

    Raises:
        SolveError: If a decomposition does not succeed.
    """
    rows, columns = matrix.shape
    largest = _largest(matrix)
    if largest == 0 or largest - largest != 0:
        value = 0.0 if largest == 0 else torch.nan
        nothing = [torch.full(s, value, dtype=torch.float64) for s in ((rows, rank), (rank,))]
        return nothing[0], nothing[1], torch.full((rank, columns), value, dtype=torch.float64)
    if not 1 / _RANGE < largest < _RANGE:
        u, s, vh = truncated(matrix.double() / largest, rank, name)
        return u, s * largest, vh
    try:
        if rows > columns:
            v, s, uh = _of_wide(matrix.T, rank, name)
            u, vh = uh.T, v.T
        else:
            u, s, vh = _of_wide(matrix, rank, name)
    except torch.linalg.LinAlgError as exc:  # type: ignore[attr-defined]
        raise _failed(matrix, name, exc) from exc
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return u * signs, s, vh * signs.T


def spectrum(matrix: Tensor, name: str) -> Tensor:
    """Return all singular values of a matrix, falling, to about 2e-8 of the largest.

    Args:
        matrix: (rows, columns), float32 or float64, finite.
        name: The tensor, for messages.

    Returns:
        (min(rows, columns),), float64.

    Raises:
        SolveError: If the decomposition does not succeed.
    """
    largest = _largest(matrix) if matrix.numel() else 0.0
    if not 1 / _RANGE < largest < _RANGE and largest:
        return spectrum(matrix.double() / largest, name) * largest
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    try:
        if wide.shape[0] <= SMALL:
            found: Tensor = torch.linalg.svdvals(wide.double())
        else:
            found = torch.linalg.eigvalsh(gram(wide)).flip(0).clamp_(min=0).sqrt_()
    except torch.linalg.LinAlgError as exc:  # type: ignore[attr-defined]
        raise _failed(matrix, name, exc) from exc
    return found


def rank_of_energy(values: Tensor, energy: float) -> int:
    """Return how many of the largest singular values hold a share of the sum of all squares.

    Values that are only the rounding of float32 count for nothing.

    Args:
        values: Falling, from 0.
        energy: Above 0, at most 1.

    Returns:
        0 if all values are 0.
    """
    if not values.numel():
        return 0
    return rank_of(values[values > ROUNDING * values[0]], None, energy)


def scratch_bytes(rows: int, columns: int, rank: int) -> int:
    """Return the bytes that `truncated` takes on top of the matrix."""
    small, large = sorted((rows, columns))
    if small <= SMALL:
        return 8 * (_WORK + 5 * small * large + 6 * small**2)
    sides, extra = small + large, rank + block(rank)
    if MANY * rank < small:
        return 8 * (_WORK + TILE + 2 * (most(small, rank) + extra) * sides)
    return 8 * (_WORK + TILE + 5 * small**2 + 3 * min(extra, small) * sides)


def flops(rows: int, columns: int, rank: int) -> float:
    """Return the operations of `truncated`, about, those of products at the pace of the others."""
    small, large = sorted((rows, columns))
    if small <= SMALL or MANY * rank >= small:
        return 1.0 * large * small**2 + 5.0 * small**3
    return 4.0 * rows * columns * 6 * rank


def spectrum_bytes(rows: int, columns: int) -> int:
    """Return the bytes that `spectrum` takes on top of the matrix."""
    small, large = sorted((rows, columns))
    whole = small * large if small <= SMALL else 0
    return 8 * (_WORK + TILE + 5 * small**2 + 2 * whole)


def spectrum_flops(rows: int, columns: int) -> float:
    """Return the operations of `spectrum`, about, those of products at the pace of the others."""
    small, large = sorted((rows, columns))
    return 0.5 * large * small**2 + 1.5 * small**3


def _largest(matrix: Tensor) -> float:
    """Return the largest magnitude, NaN if one is."""
    least, most = torch.aminmax(matrix)
    return float(torch.maximum(-least, most))


def _failed(matrix: Tensor, name: str, why: Exception) -> SolveError:
    problem = f"no singular values of {list(matrix.shape)} were found: {why}"
    return SolveError(problem, where=name, hint="are the weights of both models sound?")


def _of_wide(matrix: Tensor, rank: int, name: str) -> Factors:
    """Return factors of a matrix that has at least as many columns as rows."""
    rows, extra = matrix.shape[0], block(rank)
    if rows <= SMALL:
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    if MANY * rank < rows:
        basis = krylov(matrix, rank, name)
    else:
        squares, vectors = torch.linalg.eigh(gram(matrix))
        if float(squares[-rank]) > _SEPARATE * float(squares[-1]):
            return _by_products(matrix, vectors[:, -rank:].flip(1))
        basis = vectors[:, -(rank + extra) :].contiguous()
    right, core = torch.linalg.qr(times(matrix.T, basis))  # (columns, k), (k, k)
    u, s, vh = torch.linalg.svd(core.T)
    return basis @ u[:, :rank], s[:rank], vh[:rank] @ right.T


def _by_products(matrix: Tensor, left: Tensor) -> Factors:
    """Return factors from left singular vectors, whose products with the matrix are orthogonal."""
    right = times(matrix.T, left).T
    values = torch.linalg.vector_norm(right, dim=1)
    order = values.argsort(descending=True, stable=True)
    right = right[order].div_(values[order].unsqueeze(1))
    return left[:, order], values[order], right
