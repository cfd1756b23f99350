"""Singular vectors of task vectors, in float64, without those that rounding makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import TYPE_CHECKING

from merge_kit.errors import SolveError
from merge_kit.methods import ops
from merge_kit.methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from merge_kit.methods.base import Slab

NOISE = 2.0**-23
"""Singular values below this share of the largest are rounding of float32."""

PARALLEL = 1e-5
"""Unit vectors that are closer to dependent than this have no direction of their own."""

TALL = 4
"""Matrices with so many times more rows than columns are first brought to a square one."""


def matrices(name: str, shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Return a tensor as (matrices, rows, columns); None if it is none.

    Three axes of a tensor of experts are a matrix for each expert, two axes of their biases are
    none. Otherwise what has more than two axes (a convolution) is one matrix of (first axis, all
    others).
    """
    experts = "expert" in name or "moe" in name
    if len(shape) < 2 or (experts and len(shape) == 2 and name.endswith("bias")):
        return None
    if len(shape) == 3 and experts:
        return shape
    return 1, shape[0], prod(shape[1:])


@dataclass(frozen=True, slots=True)
class Parts:
    """Singular vectors and values: left (rows, k), values (k,) falling, right (k, columns)."""

    left: Tensor
    values: Tensor
    right: Tensor

    def first(self, count: int) -> Parts:
        """Return those of the largest values."""
        return Parts(self.left[:, :count], self.values[:count], self.right[:count])


def decompose(matrix: Tensor, floor: float, name: str) -> Parts:
    """Return the singular vectors whose values are more than rounding.

    Args:
        matrix: (rows, columns), float64.
        floor: The largest singular value that is rounding; so is `NOISE` of the largest of all.
        name: The tensor, for messages.

    Raises:
        SolveError: If the decomposition does not succeed.
    """
    try:
        left, values, right = _svd(matrix)
    except torch.linalg.LinAlgError as exc:  # type: ignore[attr-defined]
        problem = f"no singular values of {list(matrix.shape)} were found: {exc}"
        hint = "merge this tensor by another method, with a rule under `tensors:`"
        raise SolveError(problem, where=name, hint=hint) from exc
    largest = float(values[0]) if len(values) else 0.0
    kept = int((values > max(NOISE * largest, floor)).sum())
    return Parts(left, values, right).first(kept)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = matrix.shape
    if rows < columns:
        left, values, right = _svd(matrix.T)
        return right.T, values, left.T
    if rows < TALL * columns:
        found: tuple[Tensor, Tensor, Tensor] = torch.linalg.svd(matrix, full_matrices=False)
        return found
    basis, square = torch.linalg.qr(matrix)
    left, values, right = torch.linalg.svd(square, full_matrices=False)
    return basis @ left, values, right


def nearest_orthogonal(vectors: Tensor, name: str) -> Tensor:
    """Return the matrix with orthonormal columns (or rows) that is closest to unit vectors.

    Directions that they do not span, those of vectors that depend on one another, are left out
    instead of being made up.
    """
    parts = decompose(vectors, 0.0, name)
    kept = int((parts.values > PARALLEL * parts.values[:1]).sum())
    parts = parts.first(kept)
    return parts.left @ parts.right


def norm(matrix: Tensor) -> float:
    """Return the length of a matrix of float64; its squares neither vanish nor overflow."""
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    return largest * float(torch.linalg.vector_norm(matrix / largest)) if largest else 0.0


def rounding_floor(base: Tensor) -> float:
    """Return the spectral norm of what rounding a float32 matrix like the base leaves, about.

    Args:
        base: (rows, columns).
    """
    if not base.numel():
        return 0.0
    size = float(torch.linalg.vector_norm(base, dtype=torch.float64)) / sqrt(base.numel())
    return 2.0**-24 * size * (sqrt(base.shape[0]) + sqrt(base.shape[1]))


Solve = Callable[[list["Tensor"], list[float], str], "Tensor"]
"""Returns the merge of task vectors, (rows, columns) each in float64.

It gets, for each, the largest singular value that is rounding; and the name of the tensor.
"""


def merged(
    slab: Slab, weights: Sequence[float], lambda_: float, other: float | None, solve: Solve
) -> Tensor:
    """Return base + lambda times what `solve` makes of each matrix of weighted task vectors.

    What is no matrix is base + other * the sum of weighted task vectors.

    Args:
        other: None for lambda divided by the number of models whose weight is not 0.
    """
    assert slab.base is not None  # needs_base
    rows, shape = slab.deltas, matrices(slab.name, slab.shape)
    used = [(row, w) for row, w in zip(rows, weights, strict=True) if w]
    if not used or not slab.base.numel():
        return slab.base.clone()
    if shape is None:
        factor = lambda_ / len(used) if other is None else other
        return ops.weighted_sum(rows, [w * factor for w in weights], slab.base)
    size = shape[1] * shape[2]
    for at in range(0, rows.shape[1], size):
        deltas = [row[at : at + size].double().view(shape[1:]).mul(w) for row, w in used]
        base = slab.base[at : at + size]
        if not all(bool(torch.isfinite(matrix).all()) for matrix in (base, *deltas)):
            rows[0][at : at + size].fill_(torch.nan)  # no singular vectors: the engine looks for it
            continue
        floor = rounding_floor(base.view(shape[1:]))
        found = solve(deltas, [floor * abs(w) for _, w in used], slab.name)
        sum_ = found.mul_(lambda_).flatten().add_(base.double())
        rows[0][at : at + size].copy_(sum_)
    return rows[0]


def scratch_bytes(models: int, elements: int) -> int:
    """Return the bytes of task vectors in float64, of singular vectors, and of work space."""
    return 8 * elements * (5 * models + 12)  # measured: 52 of these 62 for 10 square matrices


def svd_flops(shape: tuple[int, ...], name: str) -> float:
    """Return the operations of one decomposition of each matrix of a tensor, about."""
    found = matrices(name, shape)
    if found is None or not prod(shape):
        return 0.0
    count, rows, columns = found
    large, small = max(rows, columns), min(rows, columns)
    return count * (6.0 * large * small**2 + 20.0 * small**3)
