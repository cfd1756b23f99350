"""Merges that look at one element or one row: nearswap, arcee fusion, SCE, RAM.

Wan et al. 2024 (https://arxiv.org/abs/2408.07990), Yuan et al. 2026
(https://arxiv.org/abs/2601.13572).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor

import numpy as np

from tests.oracles.pruned import chosen
from tests.oracles.values import DOUBT, Array, Mask, Wanted, added, quotient


def nearswap(base: Array, model: Array, t: float) -> Wanted:
    """Return base + sign(d) min(|d|, t)."""
    delta = model - base
    value = base + np.sign(delta) * np.minimum(np.abs(delta), t)
    return Wanted(value, np.abs(base) + np.abs(model) + np.abs(base), np.ones(base.shape, bool))


def probabilities(x: Array) -> Array:
    """Return the softmax over the last axis, 1e-8 added to each."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True) + 1e-8


def importance(base: Array, model: Array) -> Array:
    """Return |d| times the divergence of the row, never below 0."""
    if base.ndim == 0:
        return np.zeros(())
    p, q = probabilities(model), probabilities(base)
    divergence = np.sum(p * np.log(p / q), axis=-1, keepdims=True)
    return np.abs(model - base) * np.maximum(divergence, 0)


def arcee_fusion(base: Array, model: Array) -> Wanted:
    """Return the model where its importance is at least median + 1.5 interquartile ranges."""
    if base.size == 0:
        return added(base, [model], [1.0])
    scores = importance(base, model)
    ordered = np.sort(scores.ravel())
    low, middle, high = (ordered[floor(q * (ordered.size - 1))] for q in (0.25, 0.5, 0.75))
    edge = middle + 1.5 * (high - low)
    sure = (np.abs(scores - edge) > 1e-9 * abs(edge)) | (scores == edge)
    return added(base, [model], [(scores >= edge).astype(float)], sure)


def differing(deltas: Sequence[Array], share: float) -> Mask:
    """Return SCE's selection: the elements of largest variance among those that have any."""
    if share >= 1:
        return np.ones(deltas[0].shape, bool)
    total, squares = sum(deltas), sum(d * d for d in deltas)
    variance = len(deltas) * squares - total * total  # times n^2: exact where deltas are few bits
    count = int(share * np.count_nonzero(variance))
    return chosen([variance], 0, count)[0]


def sce(base: Array, models: Sequence[Array], share: float, doubt: float = DOUBT) -> Wanted:
    """Return base + sum(w m d) / sum(w m), with energies as weights."""
    deltas = [m - base for m in models]
    picked = (
        differing(deltas, share) if len(deltas) > 1 or share == 0 else np.ones(base.shape, bool)
    )
    deltas = [np.where(picked, d, 0.0) for d in deltas]
    energies = np.array([np.sum(d * d) for d in deltas])
    weights = energies / energies.sum() if energies.sum() > 0 else energies
    total, mass = sum(deltas), sum(np.abs(d) for d in deltas)
    sign = np.where(total >= 0, 1, -1)
    agree = [(np.sign(d) == sign) & (d != 0) for d in deltas]
    divisor = sum(w * a for w, a in zip(weights, agree, strict=True))
    factors = [
        quotient(w * a.astype(float), np.broadcast_to(divisor, base.shape))
        for w, a in zip(weights, agree, strict=True)
    ]
    sure = (np.abs(total) > doubt * mass) | (mass == 0) | (doubt == 0)
    return added(base, models, factors, sure)


def changed(base: Array, models: Sequence[Array], epsilon: float) -> list[Mask]:
    """Return which elements each model changed."""
    return [np.abs(m - base) > epsilon for m in models]


def edge(base: Array, models: Sequence[Array], epsilon: float) -> Mask:
    """Return where no change is within float32's rounding of epsilon."""
    near = [
        np.abs(np.abs(m - base) - epsilon) <= 2.0**-22 * (np.abs(m) + np.abs(base)) for m in models
    ]
    return ~np.any(near, axis=0)


def ram(base: Array, models: Sequence[Array], epsilon: float) -> Wanted:
    """Return base + the mean of the task vectors that changed an element."""
    masks = changed(base, models, epsilon)
    count = np.maximum(sum(m.astype(float) for m in masks), 1)
    return added(base, models, [m / count for m in masks], edge(base, models, epsilon))


def shared_and_alone(masks: Sequence[Mask]) -> tuple[list[int], list[int]]:
    """Return, for each model, how many elements it changed with others, and alone."""
    count = sum(m.astype(int) for m in masks)
    together = [int(np.sum(m & (count > 1))) for m in masks]
    return together, [int(np.sum(m & (count == 1))) for m in masks]


def ramplus(
    base: Array, models: Sequence[Array], epsilon: float, strengths: Sequence[float]
) -> Wanted:
    """Return RAM with what one model alone changed multiplied by its strength."""
    masks = changed(base, models, epsilon)
    count = sum(m.astype(float) for m in masks)
    factors = [
        np.where(count == 1, strength, 1 / np.maximum(count, 1)) * mask
        for mask, strength in zip(masks, strengths, strict=True)
    ]
    return added(base, models, factors, edge(base, models, epsilon))


def strengths(together: Sequence[int], alone: Sequence[int], r: float, alpha: float) -> list[float]:
    """Return 1 + r min(alpha, shared / unique) for each model, unique at least 1."""
    pairs = zip(together, alone, strict=True)
    return [1 + r * min(alpha, max(0.0, s / max(u, 1))) for s, u in pairs]
