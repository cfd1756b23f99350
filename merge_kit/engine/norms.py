"""Reads tensors whose vectors are brought to given lengths, as DoRA has it."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_kit.core.tensors import BLOCK
from merge_kit.engine.assembled import Read, row_runs
from merge_kit.engine.workspace import Workspace
from merge_kit.plan.residency import NORM_ROWS
from merge_kit.plan.sources import Normed, Source, elements


def read_normed(
    read: Read, source: Normed, start: int, stop: int, out: Tensor, work: Workspace
) -> None:
    """Fill `out` with a run of magnitude / |v| * v. A vector of zeros stays zeros.

    Lengths are in float64, over pieces of a vector that do not depend on the run.
    """
    if start == stop:
        return
    read(source.source, start, stop, out, work)
    if source.axis == 0:
        _scale_rows(read, source, start, out, work)
    else:
        _scale_columns(read, source, start, out, work)


def _scale_rows(read: Read, source: Normed, start: int, out: Tensor, work: Workspace) -> None:
    width = elements(source) // source.shape[0]
    for low, high in row_runs(start, start + out.numel(), width):
        part, row = out[low - start : high - start], low // width
        if low % width or high % width:
            squares = _kept_square(read, source.source, row, part.dtype, work)
            part.mul_(_factors(read, source, row, squares, part.dtype, work))
        else:
            rows = part.view(-1, width)
            squares = _squares(rows)
            rows.mul_(_factors(read, source, row, squares, part.dtype, work)[:, None])


def _factors(
    read: Read, source: Normed, first: int, squares: Tensor, kind: torch.dtype, work: Workspace
) -> Tensor:
    """Return what outputs `first` and on are multiplied by: their length over the one they have."""
    wanted = torch.empty(squares.shape, dtype=torch.float64)
    read(source.magnitude, first, first + squares.numel(), wanted, work)
    lengths = squares.sqrt()
    return wanted.div_(lengths).masked_fill_(lengths == 0, 0).to(kind)


def _kept_square(
    read: Read, matrix: Source, row: int, kind: torch.dtype, work: Workspace
) -> Tensor:
    """Return the squared length of a row, (1,), that a run holds in part: the next has the rest."""
    kept = work.kept.get((id(matrix), "row"))
    if kept is None or kept[0] != row:
        kept = row, _squares_by_piece(read, matrix, row, kind, work)
        work.kept[id(matrix), "row"] = kept
    found: Tensor = kept[1]
    return found


def _squares_by_piece(
    read: Read, matrix: Source, row: int, kind: torch.dtype, work: Workspace
) -> Tensor:
    total, width = torch.zeros(1, dtype=torch.float64), elements(matrix) // matrix.shape[0]
    for at in range(row * width, (row + 1) * width, BLOCK):
        count = min(BLOCK, (row + 1) * width - at)
        with work.spare(count, kind) as lent:
            read(matrix, at, at + count, lent, work)
            total += _squares(lent[None])
    return total


def _squares(rows: Tensor) -> Tensor:
    """Return the squared length of each row, in float64."""
    count, width = rows.shape
    if width > BLOCK:
        found = torch.zeros(count, dtype=torch.float64)
        for at in range(0, width, BLOCK):
            found += _squares(rows[:, at : at + BLOCK])
        return found
    batches = []
    buffer = torch.zeros(NORM_ROWS, width, dtype=torch.float64)  # one shape: sums have one order
    for at in range(0, count, NORM_ROWS):
        some = rows[at : at + NORM_ROWS]
        buffer[: len(some)].copy_(some)
        batches.append(buffer.mul_(buffer).sum(1)[: len(some)])
    return torch.cat(batches)


def _scale_columns(read: Read, source: Normed, start: int, out: Tensor, work: Workspace) -> None:
    key, width = (id(source), "columns"), source.shape[1]
    if key not in work.kept:
        squares = _column_squares(read, source.source, out.dtype, work)
        work.kept[key] = _factors(read, source, 0, squares, out.dtype, work)
    factors: Tensor = work.kept[key]
    for low, high in row_runs(start, start + out.numel(), width):
        part, left = out[low - start : high - start], low % width
        if left or high % width:
            part.mul_(factors[left : left + high - low])
        else:
            part.view(-1, width).mul_(factors)


def _column_squares(read: Read, matrix: Source, kind: torch.dtype, work: Workspace) -> Tensor:
    """Return the squared lengths of all columns, from blocks of rows in their order."""
    height, width = matrix.shape
    total, tall = torch.zeros(width, dtype=torch.float64), max(1, BLOCK // width)
    for top in range(0, height, tall):
        rows = min(tall, height - top)
        with work.spare(rows * width, kind) as lent:
            read(matrix, top * width, (top + rows) * width, lent, work)
            total += lent.view(rows, width).double().square_().sum(0)
    return total
