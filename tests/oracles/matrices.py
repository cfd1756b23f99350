"""Merges of whole matrices: spectral ones, and those weighted by evidence.

Gargiulo et al. 2025, Task singular vectors (https://arxiv.org/abs/2412.00081); Marczak et al. 2025,
Isotropic merging (https://arxiv.org/abs/2502.04959); Cheng et al. 2025, WUDI
(https://arxiv.org/abs/2503.08099); Matena and Raffel 2022 (https://arxiv.org/abs/2111.09832); Jin
et al. 2023, RegMean (https://arxiv.org/abs/2212.09849).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.oracles.values import Array

SMALL = 1e-6
"""Singular values below this share of the largest are rounding, and have no vectors."""


def decomposed(matrix: Array, largest: float = 0.0) -> tuple[Array, Array, Array]:
    """Return the singular vectors and values that are more than rounding.

    Args:
        largest: Size of what the matrix was made from, if that is more than its own.
    """
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    keep = values > SMALL * max([largest, *values[:1]])
    return left[:, keep], values[keep], right[keep]


def nearest_orthogonal(matrix: Array) -> Array:
    """Return U V^T of the singular vectors that are more than rounding."""
    left, _, right = decomposed(matrix)
    return left @ right


def tsv(deltas: Sequence[Array]) -> Array:
    """Return the merged task vector of TSV-M: truncated, then decorrelated.

    The paper truncates to min(rows, columns) / models; of more models than that, to 1.
    """
    rank = max(1, min(deltas[0].shape) // len(deltas))
    parts = [tuple(decomposed(d)) for d in deltas]
    left = np.concatenate([u[:, :rank] for u, _, _ in parts], axis=1)
    values = np.concatenate([s[:rank] for _, s, _ in parts])
    right = np.concatenate([v[:rank] for _, _, v in parts], axis=0)
    if not len(values):
        return np.zeros_like(deltas[0])
    return nearest_orthogonal(left) @ (values[:, None] * nearest_orthogonal(right))


def iso_c(deltas: Sequence[Array], *, of_rank: bool = False) -> Array:
    """Return the sum of the task vectors with all its singular values at their mean."""
    left, values, right = decomposed(sum(deltas))
    count = len(values) if of_rank else min(deltas[0].shape)
    return values.sum() / max(count, 1) * (left @ right)


def iso_cts(deltas: Sequence[Array], common: float) -> Array:
    """Return a flat spectrum over directions of the sum, and of each task beside them.

    The authors' counts: int(common r) directions are shared, what is left is divided among the
    tasks, rounded, and what that leaves is shared too.
    """
    total, count = sum(deltas), len(deltas)
    size = min(total.shape)
    of_each = round((size - int(size * common)) / count)
    shared = size - of_each * count
    left, values, right = (part for part in decomposed(total))
    lefts, spectrum, rights = [left[:, :shared]], [values[:shared]], [right[:shared]]
    beside = np.eye(total.shape[0]) - lefts[0] @ lefts[0].T
    for delta in deltas:
        u, s, v = decomposed(beside @ delta, float(np.linalg.norm(delta, 2)))
        lefts.append(u[:, :of_each])
        spectrum.append(s[:of_each])
        rights.append(v[:of_each])
    left, right = np.concatenate(lefts, axis=1), np.concatenate(rights, axis=0)
    mean = np.concatenate(spectrum).sum() / size
    return mean * (nearest_orthogonal(left) @ nearest_orthogonal(right))


def wudi(deltas: Sequence[Array]) -> Array:
    """Return the minimum of sum |(M - d) d^T|^2 / |d|^2, the one closest to the sum's null space.

    Where no task vector has anything (the null space of all rows), M is 0.
    """
    grams = [d.T @ d / np.sum(d * d) for d in deltas if np.any(d)]
    if not grams:
        return np.zeros_like(deltas[0])
    living = [d for d in deltas if np.any(d)]
    target = sum(d @ g for d, g in zip(living, grams, strict=True))
    return target @ np.linalg.pinv(sum(grams), rcond=1e-10, hermitian=True)


def fisher(
    models: Sequence[Array], evidence: Sequence[Array], weights: Sequence[float]
) -> tuple[Array, Array]:
    """Return sum(w F x) / sum(w F), and its mass; the evidence is above 0."""
    total = sum(w * f for w, f in zip(weights, evidence, strict=True))
    terms = [w * f * x / total for w, f, x in zip(weights, evidence, models, strict=True)]
    return sum(terms), sum(np.abs(t) for t in terms)


def regmean(
    models: Sequence[Array], grams: Sequence[Array], weights: Sequence[float], off: float, ridge
) -> Array:
    """Return mean + (sum w (W - mean) G) (S + ridge diag(S))^-1, G scaled off its diagonal."""
    shrunk = [g * (off + (1 - off) * np.eye(len(g))) for g in grams]
    mean = sum(w * m for w, m in zip(weights, models, strict=True)) / sum(weights)
    total = sum(w * g for w, g in zip(weights, shrunk, strict=True))
    pull = sum(w * (m - mean) @ g for w, m, g in zip(weights, models, shrunk, strict=True))
    seen = np.diag(total)
    ridged = total + np.diag(np.where(seen > 0, ridge * seen, 1.0))  # unseen inputs have no pull
    return mean + np.linalg.solve(ridged.T, pull.T).T
