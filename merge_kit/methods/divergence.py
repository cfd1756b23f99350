"""How far rows of two tensors lie apart as distributions, and the importance of their changes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from merge_kit.core.tensors import BLOCK
from merge_kit.methods.lazy import np, torch

if TYPE_CHECKING:
    from torch import Tensor

SMOOTHING = 1e-8
"""Added to every probability."""

_SCRATCH = threading.local()
"""Four blocks of each thread, used again and again: fresh memory costs more than arithmetic."""


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
        rows = out[start : start + step].view(-1, columns).numpy()
        ground, *work = _buffers(rows.shape)
        torch.from_numpy(ground).copy_(base[start : start + step].view(-1, columns))
        torch.from_numpy(rows).copy_(model[start : start + step].view(-1, columns))
        with np.errstate(over="ignore", invalid="ignore"):  # the engine looks at the result
            rows -= ground
        factors = divergences(ground, rows, work)
        np.abs(rows, out=rows)
        with np.errstate(over="ignore", invalid="ignore"):
            rows *= factors[:, None]
    return out


def _buffers(shape: tuple[int, int]) -> Any:
    """Return (4, rows, columns) numbers of scratch."""
    count = shape[0] * shape[1]
    if count > BLOCK:
        return np.empty((4, *shape))
    if not hasattr(_SCRATCH, "blocks"):
        _SCRATCH.blocks = np.empty((4, BLOCK))
    return [block[:count].reshape(shape) for block in _SCRATCH.blocks]


def divergences(base: Any, change: Any, work: Sequence[Any]) -> Any:
    """Return sum(P log(P / Q)) of each row; overwrites the base.

    P = softmax(base + change) + 1e-8, Q = softmax(base) + 1e-8. They have the same sum, so this is
    sum(Q f(P / Q - 1)) with f(t) = (1 + t) log(1 + t) - t, of which no term is negative; and P - Q
    comes from the change of the row, not from a difference of probabilities that are almost equal.
    So even changes far below the rounding of float32 leave digits, where differences of logarithms
    leave noise of either sign.

    Args:
        base: (rows, columns), numpy float64, at least one column.
        change: (rows, columns).
        work: Three arrays of that shape, which are overwritten.

    Returns:
        (rows,), not negative.
    """
    grown, terms, logs = work
    with np.errstate(over="ignore", invalid="ignore"):  # of what is not finite, if that may pass
        largest = change.max(axis=1, keepdims=True)
        far = largest[:, 0] - change.min(axis=1) > 1
        after = _softmax(base[far] + change[far], terms[far]) if far.any() else None
        before = _softmax(base, terms)
        np.subtract(change, largest, out=grown)
        grown[far] = 0
        np.expm1(grown, out=grown)  # 0 in all of a row that only moves
        mean = _sums(np.multiply(before, grown, out=terms))
        grown -= mean
        grown *= before
        grown /= 1 + mean  # P - Q
        if after is not None:
            grown[far] = after - before[far]
        before += SMOOTHING
        grown /= before  # P / Q - 1, above -1
        np.log1p(grown, out=logs)
        np.subtract(logs, 1, out=terms)
        terms *= grown
        terms += logs
        terms *= before
        return np.maximum(_sums(terms)[:, 0], 0)


def _softmax(rows: Any, work: Any) -> Any:
    """Return the softmax of each row; overwrites the rows, and an array of their shape."""
    rows -= rows.max(axis=1, keepdims=True)
    np.exp(rows, out=rows)
    np.copyto(work, rows)
    rows /= _sums(work)
    return rows


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
