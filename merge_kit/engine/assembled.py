"""Reads sources that are put together of others: sums, matrices side by side, transposes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from merge_kit.core.tensors import BLOCK
from merge_kit.engine.workspace import Workspace
from merge_kit.plan.sources import Columns, Rows, Source, Transposed, elements

Read = Callable[[Source, int, int, Tensor, Workspace], None]
"""Fills a tensor with elements [start, stop) of a flattened source."""


def read_columns(
    read: Read, source: Columns, start: int, stop: int, out: Tensor, work: Workspace
) -> None:
    """Fill `out` with a run of matrices that lie side by side."""
    width = source.shape[1]
    for low, high in row_runs(start, stop, width):
        part = out[low - start : high - start]
        if low % width or high % width:
            _row_piece(read, source, low, high, part, work)
        else:
            _whole_rows(read, source, low // width, part.view(-1, width), work)


def row_runs(start: int, stop: int, width: int) -> list[tuple[int, int]]:
    """Return a run of elements cut into a piece of a row, whole rows, and a piece of a row."""
    if not width or start == stop:
        return []
    first, last = -(-start // width) * width, stop // width * width
    if first > last:  # inside one row
        return [(start, stop)]
    return [
        (low, high) for low, high in ((start, first), (first, last), (last, stop)) if low < high
    ]


def _row_piece(
    read: Read, source: Columns, start: int, stop: int, out: Tensor, work: Workspace
) -> None:
    row, left = divmod(start, source.shape[1])
    right, first = left + stop - start, 0
    for part in source.sources:
        wide = part.shape[1]
        low, high = max(left, first), min(right, first + wide)
        if low < high:
            at = row * wide - first
            read(part, at + low, at + high, out[low - left : high - left], work)
        first += wide


def _whole_rows(read: Read, source: Columns, row: int, out: Tensor, work: Workspace) -> None:
    first, rows = 0, out.shape[0]
    for part in source.sources:
        wide = part.shape[1]
        with work.spare(rows * wide, out.dtype) as lent:
            read(part, row * wide, (row + rows) * wide, lent, work)
            out[:, first : first + wide].copy_(lent.view(rows, wide))
        first += wide


def read_transposed(
    read: Read, source: Transposed, start: int, stop: int, out: Tensor, work: Workspace
) -> None:
    """Fill `out` with a run of a transposed matrix.

    Of a wide matrix, the part of each of its rows is read; of a tall one, all of it, block by
    block.
    """
    height, width = source.source.shape  # rows become columns
    if not elements(source):
        return
    inner = source.source
    if isinstance(inner, Rows) and isinstance(inner.source, Transposed):
        _chosen_columns(read, inner.source.source, inner.rows, start, out, work)
        return
    first, last = start // height, -(-stop // height)
    with work.spare((last - first) * height, out.dtype) as lent:
        turned = lent.view(last - first, height)
        if height <= width:
            _each_row(read, source.source, first, turned, work)
        else:
            _in_blocks(read, source.source, first, turned, work)
        out.copy_(lent[start - first * height : stop - first * height])


def _chosen_columns(
    read: Read, matrix: Source, columns: Sequence[int], start: int, out: Tensor, work: Workspace
) -> None:
    """Fill `out` with a run of some columns of a matrix, -1 for zeros: it is read by rows."""
    count, width = len(columns), matrix.shape[1]
    wanted, tall = torch.tensor(columns), max(1, BLOCK // width)
    stop = start + out.numel()
    for top in range(start // count, -(-stop // count), tall):
        rows = min(tall, matrix.shape[0] - top)
        with work.spare(rows * width, out.dtype) as lent:
            read(matrix, top * width, (top + rows) * width, lent, work)
            chosen = lent.view(rows, width)[:, wanted.clamp(min=0)]
        chosen[:, wanted < 0] = 0
        low, high = max(start, top * count), min(stop, (top + rows) * count)
        out[low - start : high - start].copy_(
            chosen.view(-1)[low - top * count : high - top * count]
        )


def _each_row(read: Read, matrix: Source, first: int, out: Tensor, work: Workspace) -> None:
    height, width = matrix.shape
    with work.spare(out.shape[0], out.dtype) as lent:
        for row in range(height):
            at = row * width + first
            read(matrix, at, at + out.shape[0], lent, work)
            out[:, row].copy_(lent)


def _in_blocks(read: Read, matrix: Source, first: int, out: Tensor, work: Workspace) -> None:
    height, width = matrix.shape
    tall = max(1, BLOCK // width)
    for top in range(0, height, tall):
        rows = min(tall, height - top)
        with work.spare(rows * width, out.dtype) as lent:
            read(matrix, top * width, (top + rows) * width, lent, work)
            block = lent.view(rows, width)[:, first : first + out.shape[0]]
            out[:, top : top + rows].copy_(block.T)
