"""What an oracle returns, and the sums that all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

DOUBT = 2.0**-19
"""Relative size below which a sum that decides something is within float32's rounding of 0."""


@dataclass(frozen=True)
class Wanted:
    """The result that exact arithmetic gives.

    Attributes:
        value: The tensor.
        mass: Sum of the magnitudes of the terms, by which rounding is measured.
        sure: False where what decides (a vote, a threshold) is within rounding of its edge.
    """

    value: Array
    mass: Array
    sure: Mask


def certain(value: Array, mass: Array) -> Wanted:
    """Return a result in which nothing is decided."""
    return Wanted(value, mass, np.ones(value.shape, bool))


def added(
    base: Array, models: Sequence[Array], factors: Sequence[Array | float], sure: Mask | None = None
) -> Wanted:
    """Return base + sum(factor * (model - base)); a factor is a number or one an element."""
    value, mass = base.copy(), np.abs(base)
    for model, factor in zip(models, factors, strict=True):
        value = value + factor * (model - base)
        mass = mass + np.abs(factor) * (np.abs(model) + np.abs(base))
    return Wanted(value, mass, np.ones(base.shape, bool) if sure is None else sure)


def summed(models: Sequence[Array], factors: Sequence[float]) -> Wanted:
    """Return sum(factor * model)."""
    terms = [factor * model for model, factor in zip(models, factors, strict=True)]
    return certain(sum(terms), sum(np.abs(term) for term in terms))


def quotient(left: Array, right: Array) -> Array:
    """Return left / right, 0 where both are 0."""
    return np.divide(left, right, out=np.zeros_like(left), where=right != 0)
