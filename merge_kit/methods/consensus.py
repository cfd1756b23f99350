"""Signs that task vectors vote on, and merges of those that agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from merge_kit.methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    Rows = Tensor | Sequence[Tensor]

Elect = Literal["mass", "count"]
Merge = Literal["mean", "sum", "max"]

PIECE = 262_144
"""Elements that are worked on at once: several rows of them stay in the cache."""


def signs(rows: Rows, weights: Sequence[float], elect: Elect) -> Tensor:
    """Return the elected sign of each element, 1.0 or -1.0: (elements,).

    Args:
        rows: (models, elements), task vectors times their weights; they stay as they are.
        weights: One a model. A negative one has turned its row around, and so its vote.
        elect: "mass": the sign of the sum, which large changes decide. "count": of more votes,
            whatever their size. Where nobody wins, the sign is 1.
    """
    del weights
    votes = rows if elect == "mass" else [torch.sign(row) for row in rows]
    total = votes[0].clone() if len(votes) == 1 else votes[0] + votes[1]
    for vote in votes[2:]:
        total.add_(vote)
    return torch.ge(total, 0.0, out=total).mul_(2.0).sub_(1.0)


def disjoint(
    rows: Rows,
    weights: Sequence[float],
    sign: Tensor,
    merge: Merge,
    *,
    by_count: bool = False,
) -> Tensor:
    """Return the merge of the elements that have the elected sign; overwrites the rows.

    Args:
        rows: (models, elements), task vectors times their weights.
        weights: One a model.
        sign: (elements,), what `signs` returned.
        merge: "mean": divided by the sum of |w_i| of those that agree and are not zero. "sum":
            not divided. "max": the largest of them.
        by_count: Whether the mean divides by their number instead.
    """
    agreeing = [row.mul_(sign).clamp_min_(0.0) for row in rows]
    shares = [1.0 if by_count else abs(w) for w in weights]
    divisor = _divisor(agreeing, shares) if merge == "mean" else None
    total = agreeing[0]
    for row in agreeing[1:]:
        if merge == "max":
            torch.maximum(total, row, out=total)
        else:
            total.add_(row)
    if divisor is not None:
        total.div_(divisor)
    return total.mul_(sign)


def _divisor(agreeing: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Return the sum of the shares of what is above zero; where nothing is, a number above zero."""
    total, mask = torch.zeros(0), None
    for row, share in zip(agreeing, shares, strict=True):
        if not share:
            continue
        mask = torch.sign(row) if mask is None else torch.sign(row, out=mask)
        if share != 1.0:
            mask.mul_(share)
        if total.numel():
            total.add_(mask)
        else:
            total, mask = mask, None
    if not total.numel():
        return torch.ones_like(agreeing[0])
    return total.clamp_min_(min(share for share in shares if share))


def voted(
    rows: Tensor,
    factors: Sequence[float],
    weights: Sequence[float],
    base: Tensor,
    lambda_: float,
    *,
    normalize: bool,
) -> Tensor:
    """Return base + lambda times the disjoint merge of task vectors; overwrites the rows.

    Args:
        rows: (models, elements), at least one.
        factors: What each task vector is multiplied by.
        weights: What a mean divides by, in magnitude.
        normalize: Whether to take the mean, and not the sum.
    """
    for start in range(0, rows.shape[1], PIECE):
        piece = [row[start : start + PIECE] for row in rows]
        for row, factor in zip(piece, factors, strict=True):
            if factor != 1.0:
                row.mul_(factor)
        sign = signs(piece, weights, "mass")
        merged = disjoint(piece, weights, sign, "mean" if normalize else "sum")
        if lambda_ != 1.0:
            merged.mul_(lambda_)
        merged.add_(base[start : start + PIECE])
    return rows[0]
