"""What reading a source holds in memory: shared by the bill and the engine, so that they agree.

Beside the run of elements that is asked for, a reader holds what it keeps from slab to slab
(factors and the last strip of their product) and what it needs for the moment (a term of a sum).
"""

from __future__ import annotations

from math import prod

from merge_kit.core.tensors import BLOCK, nbytes
from merge_kit.plan.sources import (
    Chosen,
    Columns,
    Concat,
    Found,
    Generated,
    LowRank,
    Normed,
    Permuted,
    Projected,
    Scaled,
    Source,
    Sum,
    Transposed,
    elements,
)
from merge_kit.plan.walk import parts

PIECE = 8 * BLOCK
"""Elements that are read from a file at once."""

STRIP = 2 * BLOCK
"""Elements of a strip of a product of factors, about."""

KEPT = 16 * BLOCK
"""A left factor of up to so many elements is kept whole; of a larger one, rows are read."""

PROJECTED = 16 * BLOCK
"""Elements of a strip of a projected matrix, about; of one with a left factor, too."""

NORM_ROWS = 16
"""Rows whose lengths are taken at once, where rows are no longer than a block."""


def strip_rows(columns: int) -> int:
    """Return the rows of one strip of a product: whole strips are computed, whatever the slab.

    BLAS rounds by shape, so it depends on the matrix alone.
    """
    rows = max(1, STRIP // max(1, columns))
    return int(min(1024, max(16, 1 << (rows.bit_length() - 1))))


def is_kept(factor: Source) -> bool:
    """Return whether a left factor is kept whole."""
    return elements(factor) <= KEPT


def projected_passes(source: Projected) -> int:
    """Return how often the matrix is read: once for each strip, where there is a left factor."""
    rows = source.shape[0]
    return 1 if source.left is None else max(1, -(-rows // projected_strip(source)))


def projected_rows(columns: int, least: int = 16) -> int:
    """Return the rows of a strip or block of a projected matrix of so many columns."""
    return min(1024, max(least, PROJECTED // max(1, columns)))


def projected_strip(source: Projected) -> int:
    """Return the rows of a strip of the result; with a left factor, each takes a pass."""
    inner, columns = source.source.shape[1], source.shape[1]
    if source.left is not None:
        return projected_rows(columns, least=64)
    return projected_rows(max(inner, columns))


def kept_bytes(source: Source, width: int) -> int:
    """Return what stays between slabs, for elements of `width` bytes; not in feeding steps."""
    inner = 8 if isinstance(source, Projected) else width
    each = [kept_bytes(part, inner) for part in parts(source)]
    if isinstance(source, Concat | Chosen):
        return max(each, default=0)
    inside = sum(each)
    if isinstance(source, LowRank):
        columns = max(1, elements(source.a) // _rank(source))
        rows = min(strip_rows(columns), elements(source) // columns)
        left = elements(source.b) if is_kept(source.b) else 0
        return inside + width * (elements(source.a) + left + rows * (columns + _rank(source)))
    if isinstance(source, Normed) and source.axis == 1:
        return inside + 8 * source.shape[1]
    if isinstance(source, Scaled):
        return inside + width * elements(source.factors)
    if isinstance(source, Projected):
        return inside + 8 * (_projected_elements(source) + _read_factors(source))
    return inside


def _projected_elements(source: Projected) -> int:
    """Return the elements of the strip and the blocks that a projected matrix keeps."""
    (height, inner), (rows, columns) = source.source.shape, source.shape
    width = inner if source.right is None else max(inner, columns)
    block = min(projected_rows(width), height)
    tall = min(projected_strip(source), rows)
    kept = tall * columns
    kept += block * columns if source.left is not None else 0
    return kept + (block * inner if source.right is not None else 0)


def _read_factors(source: Projected) -> int:
    """Return the elements of the factors that are not held already."""
    factors = [s for s in (source.left, source.right) if s is not None]
    return sum(elements(factor) for factor in factors if not is_held(factor))


def is_held(factor: Source) -> bool:
    """Return whether a factor is in memory anyway."""
    inner = factor.source if isinstance(factor, Transposed) else factor
    return isinstance(inner, Found)


def _rank(source: LowRank) -> int:
    return max(1, source.a.shape[0])


def spare_bytes(source: Source, count: int, width: int) -> int:  # noqa: PLR0911  (one a kind)
    """Return what reading `count` elements of `width` bytes holds for the moment, beside them."""
    count = min(count, elements(source))
    inside = max((spare_bytes(part, count, width) for part in parts(source)), default=0)
    match source:
        case Sum():
            return width * count + inside
        case Columns():
            return width * count + inside
        case Generated():
            return 24 * BLOCK
        case LowRank():
            whole = max(spare_bytes(factor, elements(factor), width) for factor in _factors(source))
            return max(inside, whole, width * _left_elements(source, count))
        case Transposed():
            block = max(BLOCK, source.source.shape[-1])
            return width * (count + 2 * source.shape[1] + block) + inside
        case Normed():
            vector = elements(source) // max(1, source.shape[0])
            return max(inside, (8 * NORM_ROWS + 16) * min(BLOCK, vector) + 24 * BLOCK)
        case Permuted():
            return 3 * width * (count + 2 * prod(source.shape[1:])) + inside
        case Projected():
            sizes = [(source.source, max(PROJECTED, 16 * source.source.shape[1]))]
            sizes += [(f, elements(f)) for f in parts(source)[1:] if not is_held(f)]
            return max(spare_bytes(one, most, 8) for one, most in sizes)
        case _:
            return inside


def raw_bytes(source: Source, count: int) -> int:
    """Return the bytes that are read from files at once, for `count` elements of a source."""
    match source:
        case LowRank():
            whole = max(raw_bytes(factor, PIECE) for factor in (source.a, source.b))
            return max(whole, 0 if source.weight is None else raw_bytes(source.weight, count))
        case Normed() | Transposed():
            count = max(count, BLOCK)
        case Projected():
            count = PIECE
        case Generated() | Found():
            return 0
        case _:
            pass
    inside = parts(source)
    if inside:
        return max(raw_bytes(part, count) for part in inside)
    return nbytes(source.dtype, min(count, PIECE, elements(source)))


def _factors(source: LowRank) -> tuple[Source, ...]:
    return (source.a, source.b) if is_kept(source.b) else (source.a,)


def _left_elements(source: LowRank, count: int) -> int:
    """Return the elements of the rows of b that a slab needs, unless b is kept."""
    if is_kept(source.b):
        return 0
    columns = max(1, elements(source.a) // _rank(source))
    rows = count // columns + 2 * strip_rows(columns) + 2
    return min(rows * _rank(source), elements(source.b))
