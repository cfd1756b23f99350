"""Changes in the bases that their factors span: sums, ranks and truncations without the change.

The change of one matrix by n adapters, sum(c_i b_i a_i), has at most the rank R = r_1 + ... + r_n.
With the QR decompositions [b_1 ... b_n] = Q_b [L_1 ... L_n] and [a_1; ...; a_n]^T = Q_a [K_1 ...
K_n] it is Q_b C Q_a^T. The core C = sum(c_i L_i K_i^T) is small, and has the norm and the singular
values of the change. All of it is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, inf
from typing import TYPE_CHECKING

from merge_kit.errors import SolveError
from merge_kit.methods.lazy import torch
from merge_kit.methods.spectral import Parts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Change:
    """left @ core @ right^T.

    Attributes:
        left: (out, k), its columns orthonormal.
        core: (k, l).
        right: (in, l), its columns orthonormal.
        floor: The largest singular value of the core that is rounding.
    """

    left: Tensor
    core: Tensor
    right: Tensor
    floor: float


@dataclass(frozen=True, slots=True)
class Spanned:
    """The changes b_i @ a_i of several adapters: left @ heads[i] @ tails[i] @ right^T.

    Attributes:
        left: (out, k), its columns orthonormal.
        heads: (k, r_i) each.
        tails: (r_i, l) each.
        right: (in, l), its columns orthonormal.
    """

    left: Tensor
    heads: tuple[Tensor, ...]
    tails: tuple[Tensor, ...]
    right: Tensor

    def core(self, change: int) -> Tensor:
        """Return one change in these bases, (k, l)."""
        return self.heads[change] @ self.tails[change]

    def sum(self, coefficients: Sequence[float], noise: float) -> Change:
        """Return the sum of c_i b_i a_i; `noise` times the length of its terms is rounding."""
        total, lengths = self.left.new_zeros(self.left.shape[1], self.right.shape[1]), [0.0]
        for i, coefficient in enumerate(coefficients):
            if coefficient:
                term = self.core(i).mul_(coefficient)
                lengths.append(length(term))
                total.add_(term)
        return Change(self.left, total, self.right, noise * hypot(*lengths))


def spanned(changes: Sequence[tuple[Tensor, Tensor]]) -> Spanned:
    """Return changes in bases that all their factors share, of finite factors (a, b)."""
    ranks = [len(a) for a, _ in changes]
    left, heads = torch.linalg.qr(torch.cat([b for _, b in changes], dim=1))
    right, tails = torch.linalg.qr(torch.cat([a for a, _ in changes]).T)
    return Spanned(left, heads.split(ranks, 1), tails.T.split(ranks), right)


def length(matrix: Tensor) -> float:
    """Return the Frobenius norm, of numbers too whose squares overflow."""
    found = float(torch.linalg.vector_norm(matrix))
    if found != inf:
        return found
    largest = float(matrix.abs().max())
    return largest * float(torch.linalg.vector_norm(matrix / largest))


def decompose(change: Change, name: str) -> Parts:
    """Return the singular vectors of a core whose values are more than rounding.

    Args:
        name: The tensor, for messages.

    Raises:
        SolveError: If the decomposition does not succeed.
    """
    try:
        left, values, right = torch.linalg.svd(change.core, full_matrices=False)
    except torch.linalg.LinAlgError as exc:  # type: ignore[attr-defined]
        problem = f"no singular values of {list(change.core.shape)} were found: {exc}"
        hint = "combine these adapters by lora_concat"
        raise SolveError(problem, where=name, hint=hint) from exc
    return Parts(left, values, right).first(int((values > change.floor).sum()))


def rank_of(values: Tensor, rank: int | None, energy: float | None) -> int:
    """Return the rank that is asked for: as many values, or the fewest that hold the energy.

    Args:
        values: (k,), singular values above 0, falling.
        rank: The most, None for any.
        energy: Share of the sum of the squared values that must be held, None for all.
    """
    most = len(values) if rank is None else min(rank, len(values))
    if energy is None or not most:
        return most
    squares = (values / values[0]).square().flip(0).cumsum(0).flip(0)  # of this and later values
    missing = 0.0 if energy == 1 else 1 - energy + 2.0**-50  # a share that is met is met
    return min(most, max(1, int((squares > missing * squares[0]).sum())))  # no share is nothing


def split(change: Change, parts: Parts, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors a and b of singular vectors of a change's core, see `balanced`."""
    left, right = change.left @ parts.left, parts.right @ change.right.T
    return balanced(left, parts.values, right, rank)


def balanced(left: Tensor, values: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return a = sqrt(S) V^T and b = U sqrt(S), padded with zeros to the rank.

    Both have numbers of one size then, of which dtypes of few bits lose least. The largest element
    of each column of b is positive: the vectors of one change have one sign.

    Args:
        left: (out, k), its columns orthonormal; overwritten, as `right` is.
        values: (k,).
        right: (k, in), its rows orthonormal.
    """
    roots = values.sqrt()
    signed = (roots * signs_of(left)).unsqueeze(1)
    b, a = left.mul_(signed.T), right.mul_(signed)
    return padded(a, rank, 0), padded(b, rank, 1)


def signs_of(columns: Tensor) -> Tensor:
    """Return the sign of the largest element of each column: 1.0 or -1.0."""
    if not columns.numel():
        return columns.new_ones(columns.shape[1])
    largest = columns.gather(0, columns.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(columns.dtype)


def padded(matrix: Tensor, size: int, axis: int) -> Tensor:
    """Return a matrix with zeros behind it, up to a size along an axis."""
    missing = size - matrix.shape[axis]
    if not missing:
        return matrix
    shape = (missing, matrix.shape[1]) if axis == 0 else (matrix.shape[0], missing)
    return torch.cat([matrix, matrix.new_zeros(shape)], dim=axis)
