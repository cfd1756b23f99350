"""How far rows of two tensors lie apart as distributions, and the importance of their changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from merge_kit.core.tensors import BLOCK
from merge_kit.methods.lazy import np, torch

if TYPE_CHECKING:
    from torch import Tensor

SMOOTHING = 1e-8
"""Added to every probability."""


def importance(base: Tensor, model: Tensor, columns: int) -> Tensor:
    """Return |model - base| times the divergence of the element's row, (elements,), float64.

    That of one row does not depend on how many there are. The operands stay as they are.

    Args:
        base: (elements,), whole rows of `columns` elements one after the other.
        model: (elements,), the same rows.
    """
    out = torch.empty(model.numel(), dtype=torch.float64)
    step = max(1, BLOCK // max(1, columns)) * columns
    for start in range(0, model.numel(), max(1, step)):
        ground = base[start : start + step].double().view(-1, columns).numpy()
        other = model[start : start + step].double().view(-1, columns).numpy()
        change = other - ground
        rows = divergences(ground, other, change)
        np.abs(change, out=change)
        change *= rows[:, None]
        out[start : start + step] = torch.from_numpy(change.reshape(-1))
    return out


def divergences(base: Any, model: Any, change: Any) -> Any:
    """Return sum(P log(P / Q)) of each row, P = softmax(model) + 1e-8, Q = softmax(base) + 1e-8.

    P and Q have the same sum, so this is sum(Q f(P / Q - 1)) with f(t) = (1 + t) log(1 + t) - t,
    of which no term is negative; and P - Q comes from the change of the row, not from a difference
    of probabilities that are almost equal. So even changes far below the rounding of float32 leave
    digits, where differences of logarithms leave noise of either sign.

    Args:
        base: (rows, columns), numpy float64.
        model: (rows, columns).
        change: model - base.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # of what is not finite, if that may pass
        before = _softmax(base)
        largest = change.max(axis=1, keepdims=True)
        grown = np.expm1(change - largest)  # 0 in all of a row that only moves
        far = largest[:, 0] - change.min(axis=1) > 1
        grown[far] = 0
        mean = _sums(before * grown)
        grown -= mean
        grown *= before
        grown /= 1 + mean  # P - Q
        if far.any():
            grown[far] = _softmax(model[far]) - before[far]
        before += SMOOTHING
        grown /= before  # P / Q - 1, above -1
        terms = np.log1p(grown)
        terms *= 1 + grown
        terms -= grown
        terms *= before
        return np.maximum(_sums(terms)[:, 0], 0)


def _softmax(rows: Any) -> Any:
    shares = np.exp(rows - rows.max(axis=1, keepdims=True))
    shares /= _sums(shares.copy())
    return shares


def _sums(rows: Any) -> Any:
    """Return the sum of each row, (rows, 1), by folding the rows in halves; overwrites them.

    Sums of libraries go another way for one row than for several.
    """
    width = rows.shape[1]
    while width > 1:
        half = width // 2
        rows[:, :half] += rows[:, width - half : width]
        width -= half
    return rows[:, :1].copy()
