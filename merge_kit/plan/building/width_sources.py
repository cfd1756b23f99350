"""Tensors of a model at other sizes, as sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod, sqrt

from merge_kit.architecture.axes import Placed, Run
from merge_kit.plan.building.width_basis import Basis
from merge_kit.plan.building.width_sizes import Widths
from merge_kit.plan.sources import (
    Columns,
    Concat,
    Generated,
    Projected,
    Rows,
    Scaled,
    Source,
    Sum,
    Transposed,
    View,
)


@dataclass(frozen=True, slots=True)
class Resizer:
    """Brings tensors to other sizes: by their first elements and zeros, or hidden ones by a basis.

    Attributes:
        basis: None where the hidden size, too, is padded or cropped.
    """

    widths: Widths
    basis: Basis | None

    @property
    def factor(self) -> float:
        """What weights of norms are multiplied by."""
        return sqrt(self.widths.old.hidden_size / self.widths.new.hidden_size)

    def changes(self, placed: Placed) -> bool:
        """Return whether a tensor is not what it was."""
        if self.basis is not None and placed.has("hidden_size"):
            return True
        if any(placed.has(kind) for kind in self.widths.changed()):
            return True
        return placed.role == "matched" and self.factor != 1

    def source(self, source: Source, placed: Placed, norm: Source | None) -> Source:
        """Return a tensor at its new sizes.

        Args:
            norm: Weights of the norm in front, where a basis makes them part of the tensor.
        """
        if self.basis is not None and placed.role == "norm":
            return Generated("constant", (self.widths.new.hidden_size,), scale=self.factor)
        whole = self._matrices(source, placed, norm)
        if placed.role in ("norm", "matched") and self.factor != 1:
            return Sum(((self.factor, whole),))
        return whole

    def _matrices(self, source: Source, placed: Placed, norm: Source | None) -> Source:
        """Return a vector, a matrix, or matrices one after the other."""
        if len(placed.axes) == 1:
            return self._vector(source, placed.axes[0])
        rows, columns = placed.axes[-2:]
        if len(placed.axes) == 2:
            return self._matrix(source, rows, columns, norm)
        height, width = source.shape[1:]
        return _stacked(
            source, lambda at: self._matrix(View(source, at, (height, width)), rows, columns, norm)
        )

    def _vector(self, source: Source, runs: tuple[Run, ...]) -> Source:
        if self.basis is None or not _is_hidden(runs):
            return self._rows(source, runs)
        column = View(source, 0, (source.shape[0], 1))
        product = Projected(column, self.basis.onto, None)
        return self._taller(View(product, 0, (product.shape[0],)))

    def _matrix(
        self, source: Source, rows: tuple[Run, ...], columns: tuple[Run, ...], norm: Source | None
    ) -> Source:
        basis = self.basis
        if basis is None or not _is_hidden(rows):
            source = self._rows(source, rows)
        if basis is None or not _is_hidden(columns):
            source = self._columns(source, columns)
        elif norm is not None:
            source = self._wider(Projected(Scaled(source, norm), None, basis.back))
        else:
            source = self._wider(Projected(source, None, Transposed(basis.onto)))
        if basis is not None and _is_hidden(rows):
            source = self._taller(Projected(source, basis.onto, None))
        return source

    def _wider(self, source: Source) -> Source:
        """Return a matrix with zeros for the directions that a basis has not."""
        more = self.widths.new.hidden_size - source.shape[1]
        if not more:
            return source
        return Columns((source, Generated("zeros", (source.shape[0], more))))

    def _taller(self, source: Source) -> Source:
        """Return a vector or a matrix with zeros for the directions that a basis has not."""
        more, rest = self.widths.new.hidden_size - source.shape[0], source.shape[1:]
        return Concat((source, Generated("zeros", (more, *rest)))) if more else source

    def _rows(self, source: Source, runs: tuple[Run, ...]) -> Source:
        """Return a vector or a matrix with other rows; fused ones run by run."""
        if not any(run.length != self._new(run) for run in runs):
            return source
        rest, pieces, start = source.shape[1:], list[Source](), 0
        for run in runs:
            kept, new = min(run.length, self._new(run)), self._new(run)
            pieces.append(View(source, start * prod(rest), (kept, *rest)))
            if new > kept:
                pieces.append(Generated("zeros", (new - kept, *rest)))
            start += run.length
        return pieces[0] if len(pieces) == 1 else Concat(tuple(pieces))

    def _columns(self, source: Source, runs: tuple[Run, ...]) -> Source:
        """Return a matrix with other columns, which are never fused."""
        (run,) = runs
        old, new = run.length, self._new(run)
        if new > old:
            return Columns((source, Generated("zeros", (source.shape[0], new - old))))
        return source if new == old else Transposed(Rows(Transposed(source), range(new)))

    def _new(self, run: Run) -> int:
        return self.widths.new.elements(run.kind) if run.kind else run.length


def _is_hidden(runs: tuple[Run, ...]) -> bool:
    return runs[0].kind == "hidden_size"


def _stacked(source: Source, make: Callable[[int], Source]) -> Source:
    """Return matrices of a tensor of three axes, each made of the one from an element on."""
    count, height, width = source.shape
    made = tuple(make(i * height * width) for i in range(count))
    return View(Concat(made), 0, (count, *made[0].shape))
