"""Arithmetic on slabs that gives the same bits for every slab size.

Models are combined one after the other; reductions over the models axis are not used.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def row_dots(left: Tensor, right: Tensor) -> Tensor:
    """Return the dot product of each row in float64, (rows,), of two (rows, columns)."""
    dots = torch.empty(left.shape[0], dtype=torch.float64)
    for i, (one, other) in enumerate(zip(left, right, strict=True)):
        dots[i] = torch.dot(one.double(), other.double())
    return dots


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
