"""Merges by lengths and angles: arcs, means on the sphere, model stock.

Jang et al. 2024, Model Stock (https://arxiv.org/abs/2403.19522); Karcher 1977, Riemannian center
of mass and mollifier smoothing (https://doi.org/10.1002/cpa.3160300502).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from tests.oracles.values import Array, Wanted, certain, summed

WIDE = np.longdouble


def length(x: Array) -> float:
    """Return the Euclidean norm."""
    return float(np.sqrt(np.sum(np.square(x.astype(WIDE)))))


def angle(left: Array, right: Array) -> float | None:
    """Return the angle between two vectors, None if one of them is zero."""
    if min(length(left), length(right)) == 0:
        return None
    u, v = left.astype(WIDE) / WIDE(length(left)), right.astype(WIDE) / WIDE(length(right))
    return 2 * float(np.arctan2(np.sqrt(np.sum((u - v) ** 2)), np.sqrt(np.sum((u + v) ** 2))))


def arc_factors(left: Array, right: Array, t: float) -> tuple[float, float]:
    """Return the factors of SLERP, those of the line where sin(theta) is at most 1e-6."""
    theta = angle(left, right)
    if theta is None or np.sin(theta) <= 1e-6:
        return 1 - t, t
    return float(np.sin((1 - t) * theta) / np.sin(theta)), float(np.sin(t * theta) / np.sin(theta))


def arc(left: Array, right: Array, t: float) -> Wanted:
    """Return the point at t between two tensors taken as vectors."""
    return summed([left, right], arc_factors(left, right, t))


def vectors(x: Array, axis: int) -> Array:
    """Return the vectors along an axis as rows; a 1-d tensor is one, a 0-d tensor too."""
    if x.ndim <= 1:
        return x.reshape(1, -1)
    moved = np.moveaxis(x, axis, -1)
    return moved.reshape(-1, moved.shape[-1])


def unvectors(rows: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Undo `vectors`."""
    if len(shape) <= 1:
        return rows.reshape(shape)
    moved = np.moveaxis(np.empty(shape), axis, -1).shape
    return np.moveaxis(rows.reshape(moved), -1, axis)


def by_vectors(merge, tensors: Sequence[Array], axis: int) -> Wanted:
    """Return a merge of each vector along an axis by itself."""
    shape = tensors[0].shape
    if tensors[0].size == 0:
        return certain(np.zeros(shape), np.zeros(shape))
    found = [merge(*rows) for rows in zip(*(vectors(x, axis) for x in tensors), strict=True)]
    parts = [np.array([getattr(w, part) for w in found]) for part in ("value", "mass")]
    return certain(*(unvectors(part, shape, axis) for part in parts))


def on_deltas(merge, base: Array, tensors: Sequence[Array]) -> Wanted:
    """Return base + the merge of task vectors; the mass is that of models and base."""
    inner = merge(*(x - base for x in tensors))
    return Wanted(base + inner.value, np.abs(base) + inner.mass, inner.sure)


def multislerp(models: Sequence[Array], weights: Sequence[float]) -> Wanted:
    """Return (sum w |x|) m / |m|, m = sum w x / |x|: what the tangent space at m comes to."""
    lengths = [length(x) for x in models]
    shares = [w / n if n else 0.0 for w, n in zip(weights, lengths, strict=True)]
    middle = sum((WIDE(s) * x.astype(WIDE) for s, x in zip(shares, models, strict=True)))
    mean = length(np.asarray(middle))
    size = sum(w * n for w, n in zip(weights, lengths, strict=True))
    if mean == 0:
        return certain(np.zeros_like(models[0]), np.zeros_like(models[0]))
    return summed(models, [s * size / mean for s in shares])


def karcher(models: Sequence[Array], weights: Sequence[float], steps: int, tol: float) -> Wanted:
    """Return the mean on the sphere, at the weighted mean of the lengths.

    Gradient steps of length 1 from the normalised mean of the directions; stops where the
    tangent is shorter than `tol`. Tensors of zeros have no direction, but count in the length.
    """
    lengths = [length(x) for x in models]
    size = sum(w * n for w, n in zip(weights, lengths, strict=True)) / sum(weights)
    living = [i for i, n in enumerate(lengths) if n > 0]
    if not living:
        return certain(np.zeros_like(models[0]), np.zeros_like(models[0]))
    units = [models[i].astype(WIDE) / WIDE(lengths[i]) for i in living]
    shares = [weights[i] / sum(weights[j] for j in living) for i in living]
    factors = np.array(shares, WIDE)  # the mean as a combination of the directions

    def point(c):
        return sum(f * u for f, u in zip(c, units, strict=True))

    factors = factors / WIDE(length(np.asarray(point(factors))))
    for _ in range(steps):
        mean, tangent = point(factors), np.zeros(len(units), WIDE)
        for i, (share, unit) in enumerate(zip(shares, units, strict=True)):
            theta = angle(np.asarray(mean), np.asarray(unit))
            if theta is None or theta == 0:
                continue
            stretch = WIDE(share) * theta / np.sin(WIDE(theta))
            tangent[i] += stretch
            tangent = tangent - stretch * np.cos(WIDE(theta)) * factors
        far = length(np.asarray(point(tangent)))
        if far < tol or far == 0:
            break
        factors = np.cos(WIDE(far)) * factors + np.sin(WIDE(far)) / WIDE(far) * tangent
        factors = factors / WIDE(length(np.asarray(point(factors))))
    scaled = [float(f * size / lengths[i]) for f, i in zip(factors, living, strict=True)]
    return summed([models[i] for i in living], scaled)


def cosine(left: Array, right: Array) -> float:
    """Return the cosine of two vectors, exactly 0 at right angles and for a zero vector."""
    lengths = WIDE(length(left)) * WIDE(length(right))
    return float(np.sum(left.astype(WIDE) * right.astype(WIDE)) / lengths) if lengths else 0.0


def stock_share(deltas: Sequence[Array]) -> float:
    """Return t = n c / (1 + (n - 1) c), c the mean cosine of all pairs, at least 0."""
    pairs = list(combinations(deltas, 2))
    mean = max(0.0, sum(cosine(left, right) for left, right in pairs) / len(pairs))
    return len(deltas) * mean / (1 + (len(deltas) - 1) * mean)


def stocked(base: Array, models: Sequence[Array], share: float) -> Wanted:
    """Return base + share * mean(delta)."""
    factor = share / len(models)
    value = base + sum(factor * (m - base) for m in models)
    mass = np.abs(base) + sum(abs(factor) * (np.abs(m) + np.abs(base)) for m in models)
    return certain(value, mass)
