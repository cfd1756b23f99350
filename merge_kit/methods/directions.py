"""Means of directions: factors for a sum of vectors, from their dot products alone.

Every point that these means visit is a sum of the vectors, so that one pass for all dot products
is enough; the iteration runs on as many numbers as there are models. Sums over models are
`fsum`s, which do not depend on the order of the models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import acos, cos, fsum, isfinite, sin, sqrt
from operator import mul
from typing import TYPE_CHECKING, Any

from merge_kit.methods.lazy import torch
from merge_kit.methods.reductions import (
    TINY_SQUARE,
    Accumulator,
    Again,
    Done,
    Gram,
    Reduction,
    wide_blocks,
)

if TYPE_CHECKING:
    from typing import Self

    from merge_kit.methods.reductions import Place, Rows

BALANCED = 1e-6
"""Share of the largest squared length below which dot products do not give a sum's length."""

OPPOSITE = 1e-4
"""Sine of an angle near pi below which a point lies in no certain direction from another."""


@dataclass(frozen=True, slots=True)
class Directions:
    """What a Gram matrix says of vectors.

    Attributes:
        lengths: 0.0 for those too short to have a direction.
        cosines: Of each pair, 0 with a zero vector.
    """

    lengths: list[float]
    cosines: list[list[float]]

    @staticmethod
    def of(gram: Sequence[Sequence[float]]) -> Directions:
        """Return the lengths and cosines of a Gram matrix."""
        squares = [row[i] for i, row in enumerate(gram)]
        lengths = [sqrt(square) if square >= TINY_SQUARE else 0.0 for square in squares]
        cosines = [
            [_cosine(dot, one, other) for dot, other in zip(row, lengths, strict=True)]
            for row, one in zip(gram, lengths, strict=True)
        ]
        for i, length in enumerate(lengths):
            cosines[i][i] = 1.0 if length else 0.0
        return Directions(lengths, cosines)

    def toward(self, factors: Sequence[float]) -> list[float]:
        """Return the dot product of each unit vector with a sum of all of them."""
        return [fsum(map(mul, row, factors)) for row in self.cosines]

    def square(self, factors: Sequence[float]) -> float:
        """Return the squared length of a sum of the unit vectors."""
        return max(0.0, fsum(map(mul, factors, self.toward(factors))))


def _cosine(dot: float, one: float, other: float) -> float:
    return max(-1.0, min(1.0, dot / one / other)) if one and other else 0.0


@dataclass(frozen=True, slots=True)
class MeanDirection(Reduction):
    """Factors f_i such that sum(f_i x_i) points along the mean direction of the k rows.

    Its length is sum(w_i |x_i|). Where m = sum(w_i x_i / |x_i|) is no longer than `least`, or a
    square does not fit float64, there is no mean direction, and the factors are the weights.

    Attributes:
        weights: One a row; none if all are equal and their sum is 1.
        least: Length that m must exceed.
        steps: Steps towards the Karcher mean, at most; with none the direction is that of m.
        tolerance: A step shorter than this, in radians, is not taken and ends them.
    """

    weights: tuple[float, ...]
    least: float
    steps: int = 0
    tolerance: float = 0.0

    def accumulator(self, carry: Any) -> Accumulator:
        """Return what gathers dot products, or on a second pass the length of m."""
        return Gram().accumulator(None) if carry is None else _SumSquares(carry[1])

    def finish(self, total: Any, carry: Any) -> Done | Again:
        """Return the factors; if the vectors cancel, measure their sum first."""
        if carry is not None:
            found, _, weighted = carry
            return Done(weighted.factors(found, sqrt(total.total)))
        gram = Gram().finish(total, None).result.tolist()
        if not self.weights:
            equal = replace(self, weights=(1 / len(gram),) * len(gram))
            return equal.finish(total, carry)
        if not all(isfinite(dot) for row in gram for dot in row):
            return Done(list(self.weights))
        found = Directions.of(gram)
        square, mass = found.square(self.weights), fsum(map(abs, self.weights))
        if mass > 0 and square < BALANCED * (mass * mass) and any(found.lengths):
            pairs = zip(self.weights, found.lengths, strict=True)
            return Again((found, [w / length if length else 0.0 for w, length in pairs], self))
        return Done(self.factors(found, sqrt(square)))

    def factors(self, found: Directions, length: float) -> list[float]:
        """Return the factors, given how long m is."""
        if length <= self.least:
            return list(self.weights)
        turned = self._turned(found, [w / length for w in self.weights])
        scale = fsum(map(mul, self.weights, found.lengths))
        pairs = zip(turned, found.lengths, strict=True)
        return [scale * c / one if one else 0.0 for c, one in pairs]

    def _turned(self, found: Directions, factors: list[float]) -> list[float]:
        """Return the factors of the unit vectors after the steps: p moves along its tangent."""
        toward = found.toward(factors)  # cosine of each vector with the point p = sum(factors u)
        for _ in range(self.steps):
            pull = [
                w * _stretch(d) if one else 0.0
                for w, d, one in zip(self.weights, toward, found.lengths, strict=True)
            ]
            back = fsum(map(mul, pull, toward))
            pairs = zip(found.toward(pull), toward, strict=True)
            slopes = [pulled - back * d for pulled, d in pairs]
            # The tangent sum(pull_i (u_i - d_i p)) in factors of the unit vectors: they vanish
            # with it, where the square of its length as a difference would stop at 1e-8.
            tangent = [a - back * c for a, c in zip(pull, factors, strict=True)]
            step = sqrt(max(0.0, fsum(map(mul, tangent, slopes))))
            if step < self.tolerance or step == 0:
                break
            along, side = cos(step), sin(step) / step
            factors = [along * c + side * t for c, t in zip(factors, tangent, strict=True)]
            toward = [along * d + side * s for d, s in zip(toward, slopes, strict=True)]
        return factors


def _stretch(cosine: float) -> float:
    """Return theta / sin(theta), 0 where the direction is not certain (theta about pi)."""
    cosine = max(-1.0, min(1.0, cosine))
    sine = sqrt((1 - cosine) * (1 + cosine))
    if sine < OPPOSITE and cosine < 0:
        return 0.0
    return acos(cosine) / sine if sine else 1.0


class _SumSquares(Accumulator):
    """The squared length of a weighted sum of the rows, summed before it is squared."""

    def __init__(self, factors: Sequence[float]) -> None:
        self._factors = factors
        self.total = 0.0

    def add(self, values: Rows, place: Place) -> None:
        del place
        for wide in wide_blocks(values):
            summed = wide[0].mul_(self._factors[0])
            for row, factor in zip(wide[1:], self._factors[1:], strict=True):
                summed.add_(row.mul_(factor))
            self.total += float(torch.dot(summed, summed))

    def absorb(self, later: Self) -> None:
        self.total += later.total
