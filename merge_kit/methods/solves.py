"""Linear systems with a positive semidefinite matrix, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge_kit.errors import SolveError
from merge_kit.methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

NOISE = 2.0**-24
"""Rounding of a matrix that was stored in float32; n times as much of the largest eigenvalue is
noise, and counts as zero in a pseudo-inverse."""


def solve_from_right(matrix: Tensor, rows: Tensor, ridge: float, *, where: str) -> Tensor:
    """Return X with X (matrix + ridge * its diagonal) = rows; overwrites both.

    Where that has no inverse its pseudo-inverse takes its place. Inputs (rows and columns of the
    matrix) are first scaled to a diagonal of ones, so that their units do not matter; those whose
    diagonal is zero take no part, X is zero there.

    Args:
        matrix: (n, n), float64, symmetric, no eigenvalue below zero.
        rows: (m, n), float64.
        ridge: From 0.
        where: The tensor, for messages.

    Raises:
        SolveError: If the decomposition does not succeed.
    """
    diagonal = matrix.diagonal().clone()
    scale = diagonal.sqrt().reciprocal_().nan_to_num_(posinf=0.0)
    matrix.mul_(scale).mul_(scale.unsqueeze(1))
    matrix.diagonal().copy_((diagonal > 0).double() * (1 + ridge) + (diagonal == 0).double())
    rows.mul_(scale)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not int(failed) and float(factor.diagonal().min()) ** 2 > len(matrix) * NOISE:
        return torch.cholesky_solve(rows.T, factor).T.mul_(scale)
    del factor
    return _pseudo_solved(matrix, rows, where).mul_(scale)


def _pseudo_solved(matrix: Tensor, rows: Tensor, where: str) -> Tensor:
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError as exc:  # type: ignore[attr-defined]
        problem = f"no eigenvalues of its {len(matrix)} inputs were found: {exc}"
        hint = "set ridge above 0, or lower scale_off_diagonal"
        raise SolveError(problem, where=where, hint=hint) from exc
    kept = values > len(matrix) * NOISE * values[-1]
    inverse = values.reciprocal().mul_(kept).nan_to_num_(nan=0.0)
    found: Tensor = (rows @ vectors).mul_(inverse) @ vectors.T
    return found
