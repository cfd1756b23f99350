"""Reads matrices times factors: strip by strip in float64, and columns times numbers.

A strip is some rows of the result, its height given by the shapes alone: BLAS rounds by shape, and
the bits may not depend on the slab. The strip that a slab ends in is kept for the next one. With a
right factor alone, the rows of a strip are read once. With a left one, every row of the matrix is
part of every strip: it is read once for each of them, in blocks, and never held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_kit.engine.assembled import Read, row_runs
from merge_kit.engine.pages import buffer
from merge_kit.engine.workspace import Workspace
from merge_kit.plan.residency import projected_rows, projected_strip
from merge_kit.plan.sources import Found, Projected, Scaled, Source, Transposed, elements

Known = Mapping[str, Mapping[str, Tensor]]


def read_projected(
    read: Read, known: Known, source: Projected, start: int, stop: int, out: Tensor, work: Workspace
) -> None:
    """Fill `out` with a run of left @ matrix @ right.

    Args:
        read: Reads other sources.
        known: What was found before the run; factors of it are used where they are.
    """
    height, columns = source.shape
    if start == stop:
        return
    strips = _Strips(read, known, source, work)
    tall = projected_strip(source)
    for index in range(start // (tall * columns), -(-stop // (tall * columns))):
        strip = strips.strip(index, tall, min(tall, height - index * tall))
        begin = index * tall * columns
        low, high = max(start, begin), min(stop, begin + strip.numel())
        out[low - start : high - start].copy_(strip.view(-1)[low - begin : high - begin])


@dataclass(frozen=True, slots=True)
class _Strips:
    """Computes strips of one source."""

    read: Read
    known: Known
    source: Projected
    work: Workspace

    @property
    def width(self) -> int:
        """Columns of the wider one of the matrix and its product with the right factor."""
        right = self.source.right
        inner: int = self.source.source.shape[1]
        return inner if right is None else max(inner, right.shape[1])

    def strip(self, index: int, tall: int, rows: int) -> Tensor:
        """Return the rows of strip `index`, of `tall` rows but for the last."""
        source = self.source
        key = (id(source), "strip")
        kept = self.work.kept.get(key)
        if kept is None:
            most = min(tall, source.shape[0])
            kept = [-1, _matrix(most, source.shape[1])]
            self.work.kept[key] = kept
        found: Tensor = kept[1][:rows]
        if kept[0] != index:
            kept[0] = -1  # until it is whole
            if source.left is None:
                self._inner(index * tall, rows, found)
            else:
                self._sum(source.left, index * tall, found)
            kept[0] = index
        return found

    def _sum(self, left: Source, top: int, out: Tensor) -> None:
        """Fill `out` with rows of the result from `top` on, adding block after block."""
        factor = self._factor(left)[top : top + len(out)]
        height, step = self.source.source.shape[0], projected_rows(self.width)
        out.zero_()
        for low in range(0, height, step):
            rows = min(step, height - low)
            block = self._buffer("block", min(step, height), out.shape[1])[:rows]
            self._inner(low, rows, block)
            out.addmm_(factor[:, low : low + rows], block)

    def _inner(self, top: int, rows: int, out: Tensor) -> None:
        """Fill `out` with rows of the matrix times the right factor, if there is one."""
        matrix, right = self.source.source, self.source.right
        width = matrix.shape[1]
        run = (top * width, (top + rows) * width)
        if right is None:
            self.read(matrix, *run, out.view(-1), self.work)
            return
        lent = self._buffer("rows", min(projected_rows(self.width), matrix.shape[0]), width)[:rows]
        self.read(matrix, *run, lent.view(-1), self.work)
        torch.mm(lent, self._factor(right), out=out)

    def _buffer(self, name: str, rows: int, columns: int) -> Tensor:
        key = (id(self.source), name)
        if key not in self.work.kept:
            self.work.kept[key] = _matrix(rows, columns)
        buffer: Tensor = self.work.kept[key]
        return buffer

    def _factor(self, factor: Source) -> Tensor:
        """Return a factor: as it was found, or read and kept."""
        if isinstance(factor, Transposed) and isinstance(factor.source, Found):
            return self._factor(factor.source).T
        if isinstance(factor, Found):
            found = self.known[factor.key][factor.name]
            if found.dtype == torch.float64:
                return found.view(factor.shape)
        key = (id(factor), "factor")
        if key not in self.work.kept:
            flat = buffer(elements(factor), torch.float64)
            self.read(factor, 0, flat.numel(), flat, self.work)
            self.work.kept[key] = flat.view(factor.shape)
        whole: Tensor = self.work.kept[key]
        return whole


def _matrix(rows: int, columns: int) -> Tensor:
    return buffer(rows * columns, torch.float64).view(rows, columns)


def read_scaled(
    read: Read, source: Scaled, start: int, stop: int, out: Tensor, work: Workspace
) -> None:
    """Fill `out` with a run of a matrix whose columns are multiplied."""
    read(source.source, start, stop, out, work)
    key, width = (id(source), out.dtype), source.shape[1]
    if key not in work.kept:
        factors = torch.empty(width, dtype=out.dtype)
        read(source.factors, 0, width, factors, work)
        work.kept[key] = factors
    by: Tensor = work.kept[key]
    for low, high in row_runs(start, stop, width):
        part = out[low - start : high - start]
        if low % width or high % width:
            part.mul_(by[low % width : low % width + high - low])
        else:
            part.view(-1, width).mul_(by)
