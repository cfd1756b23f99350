"""What reading a source holds in memory: shared by the bill and the engine, so that they agree.

Beside the run of elements that is asked for, a reader holds what it keeps from slab to slab
(factors and the last strip of their product) and what it needs for the moment (a term of a sum).
"""

from __future__ import annotations

from math import prod

from merge_kit.core.tensors import BLOCK, nbytes
from merge_kit.plan.sources import (
    Columns,
    Concat,
    Generated,
    LowRank,
    Normed,
    Permuted,
    Projected,
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


def kept_bytes(source: Source, width: int) -> int:
    """Return what stays between slabs, for elements of `width` bytes; not in feeding steps."""
    each = [kept_bytes(part, width) for part in parts(source)]
    if isinstance(source, Concat):
        return max(each, default=0)
    inside = sum(each)
    if isinstance(source, LowRank):
        columns = max(1, elements(source.a) // _rank(source))
        rows = min(strip_rows(columns), elements(source) // columns)
        left = elements(source.b) if is_kept(source.b) else 0
        return inside + width * (elements(source.a) + left + rows * (columns + _rank(source)))
    if isinstance(source, Normed) and source.axis == 1:
        return inside + 8 * source.shape[1]
    return inside


def _rank(source: LowRank) -> int:
    return max(1, source.a.shape[0])


def spare_bytes(source: Source, count: int, width: int) -> int:
    """Return what reading `count` elements of `width` bytes holds for the moment, beside them."""
    count = min(count, elements(source))
    inside = max((spare_bytes(part, count, width) for part in parts(source)), default=0)
    match source:
        case Sum():
            return width * count + inside
        case Columns():
            return width * count + inside
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
            return inside + 8 * sum(elements(part) for part in parts(source))
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
        case Generated():
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
