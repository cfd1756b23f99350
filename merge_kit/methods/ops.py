"""Arithmetic on slabs that gives the same bits for every slab size.

Models are combined one after the other; reductions over the models axis are not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import atan2, sqrt
from typing import TYPE_CHECKING

from merge_kit.errors import ParameterError
from merge_kit.methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def weighted_sum(rows: Tensor, weights: Sequence[float], start: Tensor | None = None) -> Tensor:
    """Return start + sum w_i rows[i], in order; overwrites rows[0].

    Args:
        rows: (models, elements), at least one model.
        weights: One a model.
        start: (elements,), or None for zero.
    """
    total = rows[0].mul_(weights[0])
    for row, weight in zip(rows[1:], weights[1:], strict=True):
        total.add_(row, alpha=weight)
    return total if start is None else total.add_(start)


def row_angles(left: Tensor, right: Tensor) -> list[float | None]:
    """Return the angle between each pair of rows of two (rows, columns); None if one is zero.

    Row by row, in float64: the angle of one row does not depend on how many there are.
    """
    angles: list[float | None] = []
    for one, other in zip(left, right, strict=True):
        u, v = one.double(), other.double()
        lengths = float(torch.dot(u, u)), float(torch.dot(v, v))
        if min(lengths) <= 0:
            angles.append(None)
            continue
        u, v = u / sqrt(lengths[0]), v / sqrt(lengths[1])
        apart, together = u - v, u + v
        between = sqrt(float(torch.dot(apart, apart))), sqrt(float(torch.dot(together, together)))
        angles.append(2 * atan2(*between))
    return angles


def total_weight(weights: Sequence[float]) -> float:
    """Return the sum of weights that normalising divides by.

    Raises:
        ParameterError: If they cancel: |sum| <= 1e-6 * sum of |w|.
    """
    total, mass = sum(weights), sum(abs(w) for w in weights)
    if abs(total) <= 1e-6 * mass or mass == 0:
        raise ParameterError(
            "weight",
            f"of the models sums to {total:g}, and normalising would divide by it",
            hint="set normalize: false, or weights that do not cancel",
        )
    return total
