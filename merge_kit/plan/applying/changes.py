"""The change that an adapter makes to one tensor, as a source; where it fits and how it lies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from merge_kit.io.adapter_values import Update
from merge_kit.plan.sources import (
    Concat,
    Generated,
    LowRank,
    Normed,
    Rows,
    Source,
    Sum,
    Transposed,
    View,
    of_file,
)

Lie = Literal["straight", "transposed"]


@dataclass(frozen=True, slots=True)
class Change:
    """scale * b @ a of an update, as it falls on one tensor of a model.

    Attributes:
        shape: Of the tensor.
        factor: The update's scale times the adapter's weight.
        lie: Whether the tensor has the outputs first, or last.
        expert: The one that the tensor belongs to, of experts that are stored apart.
        rows: First row and row behind the last of the update that the tensor is, of such.
        bias: Whether the tensor is the module's bias.
    """

    update: Update
    shape: tuple[int, ...]
    factor: float
    lie: Lie = "straight"
    expert: int | None = None
    rows: tuple[int, int] = (0, 0)
    bias: bool = False

    def times(self, factor: float) -> Change:
        """Return the change times a number."""
        return replace(self, factor=self.factor * factor)

    def added_to(self, under: Source | None) -> Source:
        """Return a source plus this change, or the change alone."""
        if self.bias:
            return self._bias(under)
        if self.update.kind != "experts":
            return self._whole(under)
        if self.expert is not None:
            return _product(under, *self._expert(self.expert), self.factor, self.lie, self.shape)
        matrix, pieces = self.shape[1:], []
        for expert in range(self.update.experts):
            part = None if under is None else View(under, expert * prod(matrix), matrix)
            pieces.append(_product(part, *self._expert(expert), self.factor, self.lie, matrix))
        return View(Concat(tuple(pieces)), 0, self.shape)

    def normed(self, under: Source) -> Source:
        """Return DoRA's weight: what `added_to` gives, each output's vector of the length told."""
        magnitude = self.update.magnitude
        assert magnitude is not None
        axis: Literal[0, 1] = 1 if self.lie == "transposed" else 0
        return Normed(self.added_to(under), of_file(magnitude), axis)

    def _bias(self, under: Source | None) -> Source:
        assert self.update.bias is not None
        change = (self.factor, of_file(self.update.bias))
        return Sum((change,) if under is None else ((1.0, under), change))

    def _whole(self, under: Source | None) -> Source:
        a, b = of_file(self.update.a), of_file(self.update.b)
        matrix = (self.shape[0], prod(self.shape[1:]))
        part = None if under is None else _shaped(under, matrix)
        left = _shaped(b, (b.shape[0], prod(b.shape[1:])))
        right = _shaped(a, (a.shape[0], prod(a.shape[1:])))
        changed = _product(part, right, left, self.factor, self.lie, matrix)
        return _shaped(changed, self.shape)

    def _expert(self, expert: int) -> tuple[Source, Source]:
        """Return a and b of one expert: rows of a next to one another, columns of b far apart."""
        rank, count = self.update.rank, self.update.experts
        a = of_file(self.update.a)
        b: Source = of_file(self.update.b)
        right = View(a, expert * rank * a.shape[1], (rank, a.shape[1]))
        if self.rows != (0, 0):
            start, stop = self.rows
            b = View(b, start * b.shape[1], (stop - start, b.shape[1]))
        columns = tuple(range(expert, rank * count, count))
        return right, Transposed(Rows(Transposed(b), columns))


def _product(
    under: Source | None, a: Source, b: Source, factor: float, lie: Lie, shape: tuple[int, ...]
) -> LowRank:
    if lie == "transposed":
        a, b = _transposed(b), _transposed(a)
    return LowRank(under, a, b, factor, shape)


def _transposed(source: Source) -> Source:
    return source.source if isinstance(source, Transposed) else Transposed(source)


def _shaped(source: Source, shape: tuple[int, ...]) -> Source:
    return source if source.shape == shape else View(source, 0, shape)


def alone(changes: tuple[Change, ...], shape: tuple[int, ...]) -> Source:
    """Return the sum of changes without what they change: zeros if there are none."""
    total: Source | None = None
    for change in changes:
        total = change.added_to(total)
    return Generated("zeros", shape) if total is None else total


def difference(one: tuple[Change, ...], other: tuple[Change, ...]) -> tuple[Change, ...]:
    """Return what has to be added to the changes `other` to get `one`; equal ones cancel."""
    more, less = list(one), []
    for change in other:
        if change in more:
            more.remove(change)
        else:
            less.append(change.times(-1.0))
    return (*more, *less)
