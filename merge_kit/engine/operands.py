"""Reads any element range of any source, converted to the dtype of the computation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from merge_kit.core.dtypes import DTYPES
from merge_kit.core.tensors import BLOCK
from merge_kit.engine.assembled import read_columns, read_transposed
from merge_kit.engine.norms import read_normed
from merge_kit.engine.products import forget, read_low_rank, read_sum
from merge_kit.engine.projections import read_projected, read_scaled
from merge_kit.engine.workspace import Workspace
from merge_kit.io.reader import Reader
from merge_kit.io.torch_dtypes import torch_dtype
from merge_kit.methods import noise
from merge_kit.plan.residency import PIECE
from merge_kit.plan.sources import (
    Chosen,
    Columns,
    Concat,
    Found,
    Generated,
    LowRank,
    Memory,
    Merged,
    Normed,
    Permuted,
    Projected,
    Rows,
    Scaled,
    Source,
    Stored,
    Sum,
    Transposed,
    View,
    elements,
)

_ASSEMBLED: dict[type[Source], Callable[..., None]] = {
    LowRank: read_low_rank,
    Sum: read_sum,
    Columns: read_columns,
    Transposed: read_transposed,
    Normed: read_normed,
    Scaled: read_scaled,
}
_RANDOM = {"normal": noise.normal, "uniform": noise.uniform}
Compute = Callable[[Merged, int, int, Tensor, Workspace], None]
Artefacts = Mapping[str, Mapping[str, Tensor]]
"""What was found before the run: the tensors of each artefact by name, by its key."""


@dataclass(frozen=True, slots=True)
class Operands:
    """Where operands are read from.

    Attributes:
        compute: Computes a range of a feeding step: (source, start, stop, out, workspace).
        found: What was found before the run.
    """

    reader: Reader
    compute: Compute
    found: Artefacts = field(default_factory=dict)

    def read(  # noqa: C901  (one case a kind of source)
        self, source: Source, start: int, stop: int, out: Tensor, work: Workspace
    ) -> None:
        """Fill `out`, (stop - start,), with the elements [start, stop) of a flattened source."""
        match source:
            case Stored():
                self._stored(source, start, stop, out, work)
            case Memory():
                out.copy_(source.tensor[start:stop])
            case Merged():
                self._merged(source, start, stop, out, work)
            case View():
                self.read(source.source, source.start + start, source.start + stop, out, work)
            case Rows():
                self._rows(source, start, stop, out, work)
            case Concat():
                self._concat(source, start, stop, out, work)
            case Permuted():
                self._permuted(source, start, stop, out, work)
            case LowRank() | Sum() | Columns() | Transposed() | Normed() | Scaled():
                _ASSEMBLED[type(source)](self.read, source, start, stop, out, work)
            case Projected():
                read_projected(self.read, self.found, source, start, stop, out, work)
            case Found():
                out.copy_(self.found[source.key][source.name].reshape(-1)[start:stop])
            case Chosen():
                which = int(self.found[source.key][source.name][source.place])
                self.read(source.sources[which], start, stop, out, work)
            case Generated():
                _generate(source, start, stop, out)

    def whole(self, source: Source, dtype: torch.dtype, work: Workspace) -> Tensor:
        """Return a whole source in its shape."""
        out = torch.empty(elements(source), dtype=dtype)
        self.read(source, 0, out.numel(), out, work)
        return out.view(source.shape)

    def _file(
        self, path: Path, at: int, dtype: str, span: tuple[int, int], out: Tensor, work: Workspace
    ) -> None:
        """Read elements [span) of a tensor whose bytes start at `at`."""
        size = DTYPES[dtype].bits // 8
        kind = torch_dtype(dtype)
        start, stop = span
        for low in range(start, stop, PIECE):
            high = min(low + PIECE, stop)
            raw, memory = work.bytes("raw", (high - low) * size)
            self.reader.read_into(path, at + low * size, memory)
            out[low - start : high - start].copy_(raw.view(kind))

    def _stored(self, source: Stored, start: int, stop: int, out: Tensor, work: Workspace) -> None:
        self._file(source.span.path, source.span.start, source.dtype, (start, stop), out, work)

    def _merged(self, source: Merged, start: int, stop: int, out: Tensor, work: Workspace) -> None:
        if source.spill is None:
            self.compute(source, start, stop, out, work.child)
        else:
            assert work.scratch is not None  # set by the job of the step that spilled it
            self._file(work.scratch, source.spill, source.dtype, (start, stop), out, work)

    def _rows(self, source: Rows, start: int, stop: int, out: Tensor, work: Workspace) -> None:
        width, rows, at = prod(source.source.shape[1:]), source.rows, start
        while at < stop:
            row, inside = divmod(at, width)
            last = row  # rows that follow one another in the source are read at once
            while (last + 1) * width < stop and 0 <= rows[last] == rows[last + 1] - 1:
                last += 1
            end = min(stop, (last + 1) * width)
            part = out[at - start : end - start]
            if rows[row] < 0:
                part.zero_()
            else:
                low = rows[row] * width + inside
                self.read(source.source, low, low + end - at, part, work)
            at = end

    def _concat(self, source: Concat, start: int, stop: int, out: Tensor, work: Workspace) -> None:
        first = 0
        for part in source.sources:
            last = first + elements(part)
            low, high = max(start, first), min(stop, last)
            if low < high:
                self.read(part, low - first, high - first, out[low - start : high - start], work)
                if high == last:
                    forget(part, work)  # of many experts, one is kept
            first = last

    def _permuted(
        self, source: Permuted, start: int, stop: int, out: Tensor, work: Workspace
    ) -> None:
        width = prod(source.shape[1:])
        first, last = start // width, -(-stop // width)
        rows = source.rows or range(source.shape[0])
        whole = torch.empty((last - first) * width, dtype=out.dtype)
        picked = Rows(source.source, tuple(rows[first:last]))
        self._rows(picked, 0, whole.numel(), whole, work)
        if source.columns is not None:
            columns = torch.tensor(source.columns)
            whole = whole.view(last - first, source.shape[1], -1)[:, columns].flatten()
        out.copy_(whole[start - first * width : stop - first * width])


def _generate(source: Generated, start: int, stop: int, out: Tensor) -> None:
    draw = _RANDOM.get(source.kind)
    if draw is None:
        out.fill_(source.scale if source.kind == "constant" else 0.0)
        return
    low = start
    while low < stop:  # block by block: what is drawn stays in the cache
        high = min(stop, (low // BLOCK + 1) * BLOCK)
        drawn = draw((source.seed, source.key), low, high)
        out[low - start : high - start].copy_(drawn.mul_(source.scale))
        low = high
