"""Which elements one model changed alone, and which several did."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from merge_kit.core.tensors import BLOCK
from merge_kit.errors import ParameterError
from merge_kit.methods.lazy import np, torch
from merge_kit.methods.reductions import Accumulator, Done, Place, Reduction

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

    from merge_kit.methods.reductions import Rows


def check_epsilon(epsilon: float) -> None:
    """Check the size up to which a change is none.

    Raises:
        ParameterError: If it is no finite number of at least 0.
    """
    if not (epsilon >= 0 and isfinite(epsilon)):
        raise ParameterError("epsilon", f"is {epsilon:g}, expected a number of at least 0")


def keep_changes(rows: Tensor, epsilon: float) -> Tensor:
    """Set to zero what is at most epsilon in magnitude, in place.

    Args:
        rows: (models, elements), at least one model.

    Returns:
        How many models changed each element, (elements,), of the dtype of the rows.
    """
    count, changed = torch.zeros_like(rows[0]), torch.empty_like(rows[0])
    for row in rows:
        torch.ops.aten.hardshrink.out(row, epsilon, out=row)
        count.add_(torch.ne(row, 0, out=changed))
    return count


class _Counts(Accumulator):
    def __init__(self, epsilon: float) -> None:
        self._epsilon = epsilon
        self.total: list[tuple[int, int]] = []

    def add(self, values: Rows, place: Place) -> None:
        del place
        for start in range(0, values[0].shape[0] if len(values) else 0, BLOCK):
            rows = [row[start : start + BLOCK].numpy() for row in values]
            changed = [np.abs(row) > row.dtype.type(self._epsilon) for row in rows]
            several, once = np.zeros_like(changed[0]), np.zeros_like(changed[0])
            for mask in changed:
                several |= once & mask
                once |= mask
            self._plus([_split(mask, several) for mask in changed])

    def _plus(self, more: list[tuple[int, int]]) -> None:
        have = self.total or [(0, 0)] * len(more)
        pairs = zip(have, more, strict=True)
        self.total = [(one[0] + new[0], one[1] + new[1]) for one, new in pairs]

    def absorb(self, later: Self) -> None:
        if later.total:
            self._plus(later.total)


def _split(changed: Any, several: Any) -> tuple[int, int]:
    """Return how many of a model's changes it shares, and how many are its own."""
    shared = int(np.count_nonzero(changed & several))
    return shared, int(np.count_nonzero(changed)) - shared


@dataclass(frozen=True, slots=True)
class Overlap(Reduction):
    """For each row, how many elements above epsilon are above it elsewhere too, and how many not.

    The result is a tuple of (shared, unique), one a model; empty if there are no elements.
    """

    epsilon: float

    def accumulator(self, carry: Any) -> Accumulator:
        """Return empty counts."""
        del carry
        return _Counts(self.epsilon)

    def finish(self, total: Any, carry: Any) -> Done:
        """Return the counts."""
        del carry
        return Done(tuple(total.total))
