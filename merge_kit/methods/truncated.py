"""The largest singular values of a dense matrix and their vectors; all of its singular values.

Few values of a large matrix come from a block Krylov space: a block of random vectors, the same in
every run, is multiplied by the matrix again and again, until what the space captures of the matrix
grows no more. Sources: Halko, Martinsson and Tropp 2011, Finding structure with randomness,
https://arxiv.org/abs/0909.4061; Musco and Musco 2015, Randomized block Krylov methods,
https://arxiv.org/abs/1504.05477.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from math import hypot
from typing import TYPE_CHECKING

from merge_kit.core.tensors import BLOCK
from merge_kit.errors import SolveError
from merge_kit.methods import noise
from merge_kit.methods.lazy import torch

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

_TILE = 16 * BLOCK
"""Elements that are in float64 at once."""

_STEPS = 500
"""Blocks of a space, at most; real matrices take from 3 to 30."""

_GROWTH = 2e-4
"""A space is done when a block captures no more than this share of what is left."""

_SEPARATE = 1e-8
"""Eigenvalues of a Gram matrix above this share of the largest have vectors that the matrix maps to
orthogonal ones, to 1e-8 or so."""

_WORK = 1 << 20
"""Numbers that BLAS and LAPACK keep for themselves, about."""

_NOTHING = 1e-13
"""This share of a matrix's squared norm is nothing: float32 does not hold more of it."""

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
            found = torch.linalg.eigvalsh(_gram(wide)).flip(0).clamp_(min=0).sqrt_()
    except torch.linalg.LinAlgError as exc:  # type: ignore[attr-defined]
        raise _failed(matrix, name, exc) from exc
    return found


def norm(matrix: Tensor) -> float:
    """Return the Frobenius norm of a matrix, in float64, without a copy of it."""
    return hypot(*(float(torch.linalg.vector_norm(tile)) for _, tile in _tiles(matrix)))


def rank_of_energy(values: Tensor, energy: float) -> int:
    """Return how many of the largest singular values hold a share of the sum of all squares.

    Values that are only the rounding of float32 count for nothing.

    Args:
        values: Falling, from 0.
        energy: Above 0, at most 1.

    Returns:
        0 if all values are 0.
    """
    if not values.numel() or not float(values[0]):
        return 0
    squares = (values / values[0]).square()
    held = squares[values > ROUNDING * values[0]].cumsum(0)
    wanted = energy * float(held[-1]) * (1 - 2**-50)  # sums of squares are rounded
    return 1 + int((held < wanted).sum())


def scratch_bytes(rows: int, columns: int, rank: int) -> int:
    """Return the bytes that `truncated` takes on top of the matrix."""
    small, large = sorted((rows, columns))
    if small <= SMALL:
        return 8 * (_WORK + 5 * small * large + 6 * small**2)
    sides, extra = small + large, rank + _block(rank)
    if MANY * rank < small:
        return 8 * (_WORK + _TILE + 2 * (_most(small, rank) + extra) * sides)
    return 8 * (_WORK + _TILE + 5 * small**2 + 3 * min(extra, small) * sides)


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
    return 8 * (_WORK + _TILE + 5 * small**2 + 2 * whole)


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


def _block(rank: int) -> int:
    """Return the vectors of one block: products of few are slow, of many more than is needed."""
    return max(16, -(-rank // 2))


def _most(small: int, rank: int) -> int:
    """Return how many vectors a space may have before it starts again from its best."""
    return min(small // 2, rank + 16 * _block(rank))


def _of_wide(matrix: Tensor, rank: int, name: str) -> Factors:
    """Return factors of a matrix that has at least as many columns as rows."""
    rows, extra = matrix.shape[0], _block(rank)
    if rows <= SMALL:
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    if MANY * rank < rows:
        basis = _krylov(matrix, rank, name)
    else:
        squares, vectors = torch.linalg.eigh(_gram(matrix))
        if float(squares[-rank]) > _SEPARATE * float(squares[-1]):
            return _by_products(matrix, vectors[:, -rank:].flip(1))
        basis = vectors[:, -(rank + extra) :].contiguous()
    right, core = torch.linalg.qr(_times(matrix.T, basis))  # (columns, k), (k, k)
    u, s, vh = torch.linalg.svd(core.T)
    return basis @ u[:, :rank], s[:rank], vh[:rank] @ right.T


def _by_products(matrix: Tensor, left: Tensor) -> Factors:
    """Return factors from left singular vectors, whose products with the matrix are orthogonal."""
    right = _times(matrix.T, left).T
    values = torch.linalg.vector_norm(right, dim=1)
    order = values.argsort(descending=True, stable=True)
    right = right[order].div_(values[order].unsqueeze(1))
    return left[:, order], values[order], right


def _krylov(matrix: Tensor, rank: int, name: str) -> Tensor:
    """Return an orthonormal basis (rows, rank and more) of what the matrix maps to most.

    A space that has grown large goes on from the best that it holds.
    """
    rows, columns = matrix.shape
    block = _block(rank)
    energy = norm(matrix) ** 2
    start = noise.normal(("truncated", name), 0, columns * block).view(columns, block)
    found, captured = _like(matrix, start), -1.0
    left, known = (torch.empty(size, 0, dtype=torch.float64) for size in (rows, columns))
    for step in count():
        more = _directions(found, left, _fresh(name, rows, block, step))
        right = (matrix.T @ more.to(matrix.dtype)).double()
        left, known = torch.cat([left, more], 1), torch.cat([known, right], 1)
        values, vectors = torch.linalg.eigh(known.T @ known)
        before, captured = captured, float(values[-rank:].sum())
        best = vectors[:, -(rank + block) :]
        rest = max(energy - captured, _NOTHING * energy)
        is_done = left.shape[1] >= rank + block and captured - before <= _GROWTH * rest
        if is_done or step == _STEPS:
            break
        if left.shape[1] >= _most(rows, rank):
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


def _tiles(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield columns of a matrix in float64, a tile at a time."""
    step = max(1, _TILE // max(1, matrix.shape[0]))
    for start in range(0, matrix.shape[1], step):
        place = slice(start, start + step)
        yield place, matrix[:, place].double()


def _times(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Return matrix @ vectors in float64, for a tall matrix."""
    out = torch.empty(matrix.shape[0], vectors.shape[1], dtype=torch.float64)
    for place, tile in _tiles(matrix.T):
        torch.mm(tile.T, vectors, out=out[place])
    return out


def _gram(matrix: Tensor) -> Tensor:
    """Return matrix @ its transpose in float64."""
    gram = torch.zeros(matrix.shape[0], matrix.shape[0], dtype=torch.float64)
    for _, tile in _tiles(matrix):
        gram.addmm_(tile, tile.T)
    return gram
