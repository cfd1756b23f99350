"""How close low-rank changes are to one another: products of their factors, never the changes.

Everything is float64. A change is blocks of scale * b @ a, one block for most modules and one an
expert for fused experts; what it does to one block has nothing to do with the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge_kit.errors import NonFiniteError
from merge_kit.methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 2.0**-52

LARGEST = 1e150
"""Norm of a change: squares and products are summed over many modules."""


@dataclass(frozen=True, slots=True, eq=False)
class Directions:
    """A change by its singular values and vectors; those that only rounding makes are zero.

    Attributes:
        left: (blocks, out, k), orthonormal columns: what the change writes.
        values: (blocks, k), from 0.
        right: (blocks, k, in), orthonormal rows: what the change reads.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def square(self) -> float:
        """The squared Frobenius norm."""
        return float(self.values.square().sum())

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each block, as far as float64 can tell."""
        return tuple((self.values > 0).sum(dim=1).tolist())


@dataclass(frozen=True, slots=True)
class Products:
    """What two changes of one module have in common.

    Attributes:
        dot: The sum of the products of their elements.
        left: |U1^T U2|^2 of the spaces that they write, at most `least`.
        right: The same of the spaces that they read.
        least: The smaller of the two ranks, summed over the blocks.
        left_chance: What `left` is on average for random spaces of these ranks.
        right_chance: What `right` is.
    """

    dot: float
    left: float
    right: float
    least: int
    left_chance: float
    right_chance: float


def directions(b: Tensor, a: Tensor, scale: float, *, where: str) -> Directions:
    """Return the singular values and vectors of scale * b @ a.

    QR of the factors, then an SVD of what is as small as the rank.

    Args:
        b: (blocks, out, rank), float64.
        a: (blocks, rank, in), float64.
        scale: Any number.
        where: The module, for messages.

    Raises:
        NonFiniteError: If a factor holds NaN or infinity, or the change is so large that squares
            of it overflow.
    """
    for name, factor in (("a", a), ("b", b)):
        if not bool(torch.isfinite(factor).all()):
            problem = f"the factor {name} holds values that are not finite"
            raise NonFiniteError(problem, where=where, hint="train or download it again")
    out_basis, out_rest = torch.linalg.qr(b)
    in_basis, in_rest = torch.linalg.qr(a.mT)
    core = (out_rest @ in_rest.mT) * scale
    if not float(torch.linalg.vector_norm(core)) <= LARGEST:
        problem = f"the change is too large to be compared: its scale is {scale:g}"
        raise NonFiniteError(problem, where=where, hint="look at its alpha")
    left, values, right = torch.linalg.svd(core, full_matrices=False)
    # a column of b may be as large as the row of a that it meets is small: QR rounds each by itself
    lengths = torch.linalg.vector_norm(b, dim=1) * torch.linalg.vector_norm(a, dim=2)
    size = lengths.sum(dim=1) * abs(scale)
    noise = EPSILON * max(b.shape[1], a.shape[2]) * size  # (blocks,)
    kept = values > noise.unsqueeze(1)
    return Directions(out_basis @ left, values * kept, right @ in_basis.mT)


def products(one: Directions, other: Directions) -> Products:
    """Return what two changes of equal shape have in common."""
    written = one.left.mT @ other.left  # (blocks, k of one, k of other)
    read = one.right @ other.right.mT
    weights = one.values.unsqueeze(2) * other.values.unsqueeze(1)
    both = weights > 0
    rows, columns = one.left.shape[1], one.right.shape[2]
    pairs = list(zip(one.ranks, other.ranks, strict=True))
    return Products(
        dot=float((weights * written * read).sum()),
        left=float((written.square() * both).sum()),
        right=float((read.square() * both).sum()),
        least=sum(min(pair) for pair in pairs),
        left_chance=sum(i * j for i, j in pairs) / rows,
        right_chance=sum(i * j for i, j in pairs) / columns,
    )
