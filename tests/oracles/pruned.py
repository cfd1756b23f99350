"""Task vectors that are pruned, voted on and added: TIES, magnitude, breadcrumbs, DARE, DELLA.

Yadav et al. 2023 (https://arxiv.org/abs/2306.01708), Davari and Belilovsky 2023
(https://arxiv.org/abs/2312.06795), Yu et al. 2024 (https://arxiv.org/abs/2311.03099), Deep et al.
2024 (https://arxiv.org/abs/2406.11617).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.oracles.values import DOUBT, Array, Mask, Wanted, added, quotient


def ranking(deltas: Sequence[Array]) -> Array:
    """Return flat indices by falling magnitude, of equal ones the first tensor's first first."""
    magnitudes = np.concatenate([np.abs(d).ravel() for d in deltas])
    return np.argsort(-magnitudes, kind="stable")


def chosen(deltas: Sequence[Array], first: int, stop: int) -> list[Mask]:
    """Return which elements of one model's tensors have the ranks [first, stop)."""
    order = ranking(deltas)
    mask = np.zeros(len(order), bool)
    mask[order[first:stop]] = True
    ends = np.cumsum([d.size for d in deltas])[:-1]
    parts = np.split(mask, ends)
    return [part.reshape(d.shape) for part, d in zip(parts, deltas, strict=True)]


def largest(deltas: Sequence[Array], density: float) -> list[Mask]:
    """Return the int(density n) largest, at least one if the density is above 0."""
    count = sum(d.size for d in deltas)
    keep = 0 if density == 0 else max(1, int(density * count))
    return chosen(deltas, 0, keep)


def without_outliers(delta: Array, density: float, gamma: float) -> Mask:
    """Return the int(density n) largest after the int(gamma n) largest; all at density 1.

    Where both together are more than all, fewer of the largest are left out.
    """
    if density == 1:
        return np.ones(delta.shape, bool)
    keep = int(density * delta.size)
    skipped = min(int(gamma * delta.size), delta.size - keep)
    return chosen([delta], skipped, skipped + keep)[0]


def rows_without_outliers(delta: Array, density: float, gamma: float) -> Mask:
    """Return the authors' rule for breadcrumbs: by row, the largest of what is left."""
    if delta.ndim == 0 or delta.size == 0:
        return np.ones(delta.shape, bool)
    rows = delta.reshape(-1, delta.shape[-1])
    first = int(gamma * rows.shape[1])
    last = first + int(density * rows.shape[1])
    masks = [chosen([row], first, last)[0] for row in rows]
    return np.array(masks, bool).reshape(delta.shape)


def matched(delta: Array, mask: Mask) -> float:
    """Return the L1 norm before over that after pruning, 1 if nothing is left."""
    after = np.abs(delta * mask).sum()
    return float(np.abs(delta).sum() / after) if after > 0 else 1.0


@dataclass(frozen=True)
class Vote:
    """How signs are elected and what agrees is combined.

    Attributes:
        by: "mass", "count" (whose sums are exact), or "" for no vote.
        weighted: Whether weights count in the vote; a negative one then turns a sign.
        divide: "none", "weights" that agree (their magnitudes), or "count" of those that agree.
        zero: Sign that wins where the vote is 0.
        doubt: Share of the votes below which their sum may be rounding; 0 where sums are exact.
    """

    by: str = "mass"
    weighted: bool = True
    divide: str = "weights"
    zero: int = 1
    doubt: float = DOUBT


def elected(terms: Sequence[Array], vote: Vote) -> tuple[Array, Mask]:
    """Return the sign that wins each element, 0 where the votes cancel, and where that is sure."""
    votes = [np.sign(t) if vote.by == "count" else t for t in terms]
    total, mass = sum(votes), sum(np.abs(v) for v in votes)
    exact = vote.by == "count" or vote.doubt == 0
    return np.sign(total), (np.abs(total) > vote.doubt * mass) | (mass == 0) | exact


def combined(
    base: Array,
    models: Sequence[Array],
    scales: Sequence[Array],
    weights: Sequence[float],
    factor: float,
    vote: Vote,
) -> Wanted:
    """Return base + factor * (the models' pruned task vectors, voted on and added).

    Args:
        scales: One a model and element: 0 where it is pruned, else what it is multiplied by.
    """
    deltas = [s * (m - base) for s, m in zip(scales, models, strict=True)]
    terms = [w * d for w, d in zip(weights, deltas, strict=True)]
    if not vote.by:
        total = sum(weights) if vote.divide == "weights" else 1.0
        factors = [factor * w * s / total for w, s in zip(weights, scales, strict=True)]
        return added(base, models, factors)
    sign, sure = elected(terms if vote.weighted else deltas, vote)
    sign = np.where(sign == 0, vote.zero, sign)
    voters = terms if vote.weighted else deltas
    agree = [np.sign(v) == sign for v in voters]
    divisor = np.ones(base.shape)
    if vote.divide == "weights":
        divisor = sum(abs(w) * a for w, a in zip(weights, agree, strict=True))
    elif vote.divide == "count":
        divisor = sum(a.astype(float) for a in agree)
    factors = [
        factor * quotient(w * s * a, np.broadcast_to(divisor, base.shape))
        for w, s, a in zip(weights, scales, agree, strict=True)
    ]
    return added(base, models, factors, sure)


def votes_of_model(terms: Sequence[Sequence[Array]]) -> float:
    """Return the sum of all elected signs of a model; terms are one list a tensor."""
    return sum(float(np.sign(sum(of_one)).sum()) for of_one in terms)


def keep_probabilities(delta: Array, density: float, epsilon: float, *, paper: bool) -> Array:
    """Return DELLA's probability of keeping each element."""
    rows = np.abs(delta).reshape(-1, delta.shape[-1] if delta.ndim else 1)
    count = rows.shape[1]
    ranks = np.argsort(np.argsort(rows, axis=1, kind="stable"), axis=1, kind="stable")
    if count == 1:
        shares = np.full(rows.shape, density)
    elif paper:
        shares = density + epsilon / 2 - epsilon * (count - 1 - ranks) / count
    else:
        shares = density - epsilon + 2 * epsilon * ranks / (count - 1)
    return shares.reshape(delta.shape)


def drawn(probability: Array | float) -> Array:
    """Return probabilities as they are drawn: multiples of 2^-16, of 2^-32 close to 0 or 1."""
    shares = np.asarray(probability, float)
    near = shares.size and bool(np.any((shares < 2.0**-8) | (shares > 1 - 2.0**-8)))
    steps = 2.0**32 if near else 2.0**16
    return np.rint(shares * steps) / steps
