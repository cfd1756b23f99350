"""Selection of elements by their variance over the models, and squares of what is selected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge_kit.core.tensors import BLOCK
from merge_kit.methods.lazy import torch
from merge_kit.methods.order import Cut, keep_top
from merge_kit.methods.reductions import Accumulator, Done, Place, Reduction, wide_blocks

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

    from merge_kit.methods.base import Slab
    from merge_kit.methods.reductions import Rows


def spread(rows: Tensor) -> Tensor:
    """Return numbers in the order of the variances over the models, 0.0 exactly where they agree.

    Of two models |x_1 - x_0|; of more the variance itself, n^2 times, in float64. There sums over
    differences of few bits (those of 16-bit models) are exact, so that equal variances are equal.

    Args:
        rows: (models, elements), at least one model; stays as it is.

    Returns:
        (elements,), new; negative in places if there are two models.
    """
    if len(rows) == 1:
        return torch.zeros_like(rows[0])
    if len(rows) == 2:
        return rows[1] - rows[0]
    out = torch.empty(rows.shape[1], dtype=torch.float64)
    for start in range(0, rows.shape[1], BLOCK):  # short runs stay in the cache
        _variances(rows[:, start : start + BLOCK], out[start : start + BLOCK])
    return out


def _variances(rows: Tensor, out: Tensor) -> None:
    """Set out = n sum e^2 - (sum e)^2 with e = x - x_0, at least sum e^2: nothing cancels."""
    first, apart = rows[0].double(), torch.empty_like(out)
    total, out_ = torch.zeros_like(out), out.zero_()
    for row in rows[1:]:
        torch.sub(row, first, out=apart)
        total.add_(apart)
        out_.add_(apart.square_())
    out_.mul_(len(rows)).sub_(total.square_())


def chosen(slab: Slab, cut: Cut) -> Tensor:
    """Return 1.0 for the elements whose variance a cut selects and 0.0 for others, (elements,)."""
    row = keep_top(spread(slab.deltas), cut, slab)
    return torch.ne(row, 0, out=torch.empty(row.shape, dtype=slab.deltas.dtype))


class _SquareSums(Accumulator):
    def __init__(self, *, masked: bool) -> None:
        self._masked = masked
        self.total: list[float] = []

    def add(self, values: Rows, place: Place) -> None:
        del place
        for wide in wide_blocks(values) if len(values) else ():
            rows = [row.mul_(wide[0]) for row in wide[1:]] if self._masked else wide
            self._plus([float(torch.dot(row, row)) for row in rows])

    def _plus(self, more: list[float]) -> None:
        have = self.total or [0.0] * len(more)
        self.total = [one + new for one, new in zip(have, more, strict=True)]

    def absorb(self, later: Self) -> None:
        if later.total:
            self._plus(later.total)


@dataclass(frozen=True, slots=True)
class Squares(Reduction):
    """The sum of squares of each row that is scanned, a tuple of floats.

    Attributes:
        masked: Whether the first row is a mask of 0.0 and 1.0 for the others.
    """

    masked: bool = False

    def accumulator(self, carry: Any) -> Accumulator:
        """Return an empty sum."""
        del carry
        return _SquareSums(masked=self.masked)

    def finish(self, total: Any, carry: Any) -> Done:
        """Return the sums."""
        del carry
        return Done(tuple(total.total))
