"""Reads low-rank changes: products of two factors, formed strip by strip, never whole.

A strip is some rows of the product, all columns wide, its height given by the matrix alone: BLAS
rounds by shape, and the bits may not depend on the slab. The strip that a slab ends in is kept for
the next one, and so are the factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_kit.engine.assembled import Read
from merge_kit.engine.workspace import Workspace
from merge_kit.plan.residency import is_kept, strip_rows
from merge_kit.plan.sources import LowRank, Source, Sum, elements
from merge_kit.plan.walk import parts


def read_low_rank(
    read: Read, source: LowRank, start: int, stop: int, out: Tensor, work: Workspace
) -> None:
    """Fill `out` with a run of weight + scale * b @ a."""
    if source.weight is None:
        out.zero_()
    else:
        read(source.weight, start, stop, out, work)
    _add_product(read, source, source.scale, start, out, work)


def read_sum(read: Read, source: Sum, start: int, stop: int, out: Tensor, work: Workspace) -> None:
    """Fill `out` with a run of a sum, its terms added in their order."""
    (factor, first), *rest = source.terms
    read(first, start, stop, out, work)
    if factor != 1:
        out.mul_(factor)
    for times, term in rest:
        if isinstance(term, LowRank) and term.weight is None:
            _add_product(read, term, times * term.scale, start, out, work)
            continue
        with work.spare(stop - start, out.dtype) as lent:
            read(term, start, stop, lent, work)
            out.add_(lent, alpha=times)


def forget(source: Source, work: Workspace) -> None:
    """Give back what is kept for a source and its parts."""
    if not work.kept:
        return
    gone = set(_ids(source))
    for key in [key for key in work.kept if key[0] in gone]:
        del work.kept[key]


def _ids(source: Source) -> Iterator[int]:
    yield id(source)
    for part in parts(source):
        yield from _ids(part)


def _add_product(
    read: Read, source: LowRank, scale: float, start: int, out: Tensor, work: Workspace
) -> None:
    """Add scale * b @ a to a run of its elements."""
    rank, stop = source.a.shape[0], start + out.numel()
    if not rank or start == stop:
        return
    columns = elements(source.a) // rank
    height, tall = elements(source) // columns, strip_rows(columns)
    first, last = start // (tall * columns), -(-stop // (tall * columns))
    factors = _Factors(
        _whole(read, source.a, out.dtype, work).view(rank, columns),
        *_left(read, source, (first * tall, min(last * tall, height)), out.dtype, work),
    )
    for index in range(first, last):
        strip = _strip(source, factors, scale, index, (tall, height), work)
        begin = index * tall * columns
        low, high = max(start, begin), min(stop, begin + strip.numel())
        out[low - start : high - start].add_(strip.view(-1)[low - begin : high - begin])


@dataclass(frozen=True, slots=True)
class _Factors:
    """The right factor, and rows of the left one from row `top` on."""

    right: Tensor
    left: Tensor
    top: int


def _strip(
    source: LowRank,
    factors: _Factors,
    scale: float,
    index: int,
    shape: tuple[int, int],
    work: Workspace,
) -> Tensor:
    """Return strip `index` of scale * b @ a; `shape` is that of a strip, and rows there are."""
    (tall, height), right = shape, factors.right
    key = (id(source), scale, right.dtype)
    kept = work.kept.get(key)
    if kept is None:
        most = min(tall, height)
        kept = [-1, right.new_empty(most, len(right)), right.new_empty(most, right.shape[1])]
        work.kept[key] = kept
    top = index * tall
    rows = min(tall, height - top)
    left, strip = kept[1][:rows], kept[2][:rows]
    if kept[0] != index:
        kept[0] = -1  # until it is whole
        at = top - factors.top
        torch.mul(factors.left[at : at + rows], scale, out=left)
        torch.mm(left, right, out=strip)
        kept[0] = index
    found: Tensor = strip
    return found


def _whole(read: Read, factor: Source, kind: torch.dtype, work: Workspace) -> Tensor:
    """Return a factor, flat, and keep it."""
    key = (id(factor), kind)
    if key not in work.kept:
        found = torch.empty(elements(factor), dtype=kind)
        read(factor, 0, found.numel(), found, work)
        work.kept[key] = found
    flat: Tensor = work.kept[key]
    return flat


def _left(
    read: Read, source: LowRank, rows: tuple[int, int], kind: torch.dtype, work: Workspace
) -> tuple[Tensor, int]:
    """Return at least these rows of the left factor, and the first row that it has."""
    rank, (first, last) = source.a.shape[0], rows
    if is_kept(source.b):
        return _whole(read, source.b, kind, work).view(-1, rank), 0
    some = torch.empty((last - first) * rank, dtype=kind)
    read(source.b, first * rank, last * rank, some, work)
    return some.view(-1, rank), first
