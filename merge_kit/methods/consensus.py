"""Signs that task vectors vote on, and merges of those that agree."""

from __future__ import annotations

import threading
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

_SCRATCH = threading.local()


def signs(rows: Rows, weights: Sequence[float], elect: Elect) -> Tensor:
    """Return the elected sign of each element, 1.0 or -1.0: (elements,).

    Args:
        rows: (models, elements), task vectors times their weights; they stay as they are.
        weights: One a model. A negative one has turned its row around, and so its vote.
        elect: "mass": the sign of the sum, which large changes decide. "count": of more votes,
            whatever their size. Where nobody wins, the sign is 1.
    """
    del weights
    if elect == "count":
        return _more_votes(rows)
    total = rows[0].clone() if len(rows) == 1 else rows[0] + rows[1]
    for row in rows[2:]:
        total.add_(row)
    return torch.ge(total, 0.0, out=total).mul_(2.0).sub_(1.0)


def _more_votes(rows: Rows) -> Tensor:
    """Return the sign that more rows have; NaN where one is not finite, which shows if outvoted."""
    total, scratch = torch.sign(rows[0]), _scratch(0, rows[0])
    for row in rows[1:]:
        total.add_(torch.sign(row, out=scratch))
    torch.ge(total, 0.0, out=total).mul_(2.0).sub_(1.0)
    for row in rows:
        total.add_(torch.mul(row, 0.0, out=scratch))
    return total


def _scratch(place: int, like: Tensor) -> Tensor:
    """Return a row of this thread, overwritten by the next that asks for the place; or a new one.

    Three fresh rows at a time are more than glibc keeps at the end of its heap: where nothing lies
    behind them, their pages would come from the system anew for each piece.
    """
    if like.numel() > PIECE:
        return torch.empty_like(like)
    if not hasattr(_SCRATCH, "rows"):
        _SCRATCH.rows = torch.empty(2, PIECE, dtype=torch.float64)
    row: Tensor = _SCRATCH.rows[place].view(like.dtype)
    return row[: like.numel()]


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
    total, mask = _scratch(0, agreeing[0]), _scratch(1, agreeing[0])
    counted = [(row, share) for row, share in zip(agreeing, shares, strict=True) if share]
    if not counted:
        return total.fill_(1.0)
    for i, (row, share) in enumerate(counted):
        one = torch.sign(row, out=mask if i else total)
        if share != 1.0:
            one.mul_(share)
        if i:
            total.add_(one)
    return total.clamp_min_(min(share for _, share in counted))


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
