"""Changes aligned by one decomposition of them all, and merges of their elements there (KnOTS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot
from typing import TYPE_CHECKING

from merge_kit.methods.lazy import torch
from merge_kit.methods.low_rank import Change, decompose, length, signs_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Bases:
    """Changes b_i @ a_i = left @ heads[i] @ tails[i] @ rights[i]^T.

    Attributes:
        left: (out, k), its columns orthonormal; all changes share it.
        heads: (k, r_i) each.
        tails: (r_i, l_i) each.
        rights: (in, l_i) each, its columns orthonormal.
    """

    left: Tensor
    heads: tuple[Tensor, ...]
    tails: tuple[Tensor, ...]
    rights: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Aligned:
    """Changes left @ diag(values) @ rows[i], with one left and one scale for all.

    Attributes:
        left: (out, m), its columns orthonormal.
        values: (m,), falling.
        rows: (m, in) each; side by side they have orthonormal rows.
    """

    left: Tensor
    values: Tensor
    rows: tuple[Tensor, ...]


def bases(changes: Sequence[tuple[Tensor, Tensor]]) -> Bases:
    """Return changes in one left basis and a right one each, of finite factors (a, b)."""
    left, heads = torch.linalg.qr(torch.cat([b for _, b in changes], dim=1))
    pairs = [torch.linalg.qr(a.T) for a, _ in changes]
    return Bases(
        left,
        heads.split([len(a) for a, _ in changes], 1),
        tuple(triangle.T for _, triangle in pairs),
        tuple(basis for basis, _ in pairs),
    )


def align(found: Bases, chosen: Sequence[int], noise: float, name: str) -> Aligned:
    """Return the parts of [d_1 ... d_n] = U S [V_1^T ... V_n^T], without those of rounding.

    The d_i are the chosen changes, side by side: (out, chosen * in). Of each row of V^T the
    largest element is positive in the bases of the changes, so that nothing hangs on the signs
    that a decomposition happens to choose.

    Args:
        noise: Singular values below this share of the length of all changes are rounding.
        name: The tensor, for messages.
    """
    cores = [found.heads[i] @ found.tails[i] for i in chosen]
    floor = noise * hypot(*map(length, cores))
    beside = Change(found.left, torch.cat(cores, dim=1), found.left, floor)
    parts = decompose(beside, name)
    signs = signs_of(parts.right.T)
    widths = [core.shape[1] for core in cores]
    right = torch.split(parts.right * signs.unsqueeze(1), widths, dim=1)
    rows = tuple(v @ found.rights[i].T for v, i in zip(right, chosen, strict=True))
    return Aligned(found.left @ (parts.left * signs), parts.values, rows)


def change_of(left: Tensor, rows: Tensor, noise: float) -> Change:
    """Return left @ rows as a change, of a left with orthonormal columns."""
    right, core = torch.linalg.qr(rows.T)
    return Change(left, core.T, right, noise * length(core))


def keep_largest(row: Tensor, density: float) -> None:
    """Set to zero all but int(density * n) elements of the largest magnitude, at least one.

    Of equal magnitudes the first are kept. Density 0 keeps nothing, 1 everything.
    """
    if density in {0, 1} or not row.numel():
        row.mul_(density)
        return
    count = max(1, int(density * row.numel()))
    sizes = row.abs()
    least = sizes.kthvalue(row.numel() - count + 1).values
    equal = (sizes == least).logical_and_(
        (sizes == least).cumsum(0) <= count - (sizes > least).sum()
    )
    row.mul_(equal.logical_or_(sizes > least))
