"""A bracket around a k-th magnitude: what lies inside is collected, or counted by bit patterns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any

from merge_kit.methods.lazy import np
from merge_kit.methods.order_states import EMPTY, Count, Gathering, InRun, Resolved, Run, State

if TYPE_CHECKING:
    from merge_kit.methods.reductions import Place

BINS = 65_536


@dataclass(frozen=True, slots=True)
class Between(State):
    """The k-th magnitude x is probably in low < x <= high, 0 <= low.

    Attributes:
        common: Magnitudes in there that are counted, not collected.
    """

    low: float
    high: float
    common: tuple[float, ...] = ()

    def gathering(self, cap: int) -> Gathering:
        return _Inside(self, cap)


class _Inside(Gathering):
    state: Between

    def __init__(self, state: Between, cap: int) -> None:
        self.state = state
        self._cap = cap
        self._above = self._inside = self._nonzero = 0
        self._runs: list[Run] = []

    def add(self, magnitudes: Any, place: Place) -> None:
        kind = magnitudes.dtype.type
        found = magnitudes > kind(self.state.low)
        inside = int(np.count_nonzero(found))
        if self.counts_nonzero:
            self._nonzero += int(np.count_nonzero(magnitudes > 0)) if self.state.low else inside
        if self.state.high < inf:
            above = magnitudes > kind(self.state.high)
            over = int(np.count_nonzero(above))
            self._above += over
            inside -= over
            np.logical_xor(found, above, out=found)
        equal = []
        for value in self.state.common if inside else ():
            same = magnitudes == kind(value)
            equal.append(int(np.count_nonzero(same)))
            np.logical_xor(found, same, out=found)
        rest = inside - sum(equal)
        self._inside += rest
        if inside and self._inside <= self._cap:
            values = magnitudes.take(np.flatnonzero(found) if rest else [])
            self._runs.append(Run(place, values, tuple(equal)))

    def absorb(self, later: _Inside) -> None:
        self._above += later._above
        self._inside += later._inside
        self._nonzero += later._nonzero
        self._runs = self._runs + later._runs if self._inside <= self._cap else []

    def next(self, count: Count, cap: int, elements: int) -> State:
        k = count(elements, self._nonzero)
        low, high, common = self.state.low, self.state.high, self.state.common
        if k == 0:
            return EMPTY
        if k <= self._above:
            return Bins(high, inf, 0, self._nonzero)
        if self._inside > cap:
            return Bins(low, high, self._above, self._nonzero)
        held = self._inside + sum(sum(run.equal) for run in self._runs)
        if k > self._above + held:
            return Bins(0.0, low, self._above + held, self._nonzero) if low else Resolved(0.0)
        return resolve(self._runs, common, k - self._above)


def resolve(runs: Sequence[Run], common: Sequence[float], k: int) -> Resolved | InRun:
    """Return the k-th largest of what was collected, 1 <= k <= their number."""
    values = np.concatenate([run.values for run in runs])
    totals = [sum(run.equal[i] for run in runs) for i in range(len(common))]
    above = 0
    for value, total in sorted(zip(common, totals, strict=True), reverse=True):
        first = above + int(np.count_nonzero(values > value))
        if first < k <= first + total:
            counts = [run.equal[common.index(value)] for run in runs]
            return _cut(runs, value, counts, k - first)
        if k > first + total:
            above += total
    k -= above
    threshold = np.partition(values, values.size - k)[values.size - k]
    if threshold == 0:
        return Resolved(0.0)
    counts = [int(np.count_nonzero(run.values == threshold)) for run in runs]
    return _cut(runs, float(threshold), counts, k - int(np.count_nonzero(values > threshold)))


def _cut(
    runs: Sequence[Run], threshold: float, counts: Sequence[int], quota: int
) -> Resolved | InRun:
    """Return where the last of those that equal the threshold lies, or that all are taken.

    Args:
        counts: How many equal it in each run.
    """
    if quota == sum(counts):
        return Resolved(threshold)
    for run, found in zip(runs, counts, strict=True):
        if quota <= found:
            return InRun(threshold, run.place, quota)
        quota -= found
    raise AssertionError  # there are more of them than the quota


@dataclass(frozen=True, slots=True)
class Bins(State):
    """The k-th magnitude x is in low < x <= high, which holds too much: bit patterns are counted.

    Attributes:
        above: Elements above `high`.
        nonzero: Elements that are not zero.
    """

    low: float
    high: float
    above: int
    nonzero: int

    def gathering(self, cap: int) -> Gathering:
        del cap
        return _Histogram(self)


class _Histogram(Gathering):
    state: Bins

    def __init__(self, state: Bins) -> None:
        self.state = state
        self._counts = np.zeros(BINS, dtype=np.int64)
        self._float: Any = None

    def _bits(self, value: float) -> int:
        return int(self._float(value).view(_integer(self._float)))

    def _shift(self) -> int:
        width = self._bits(self.state.high) - self._bits(self.state.low)
        return max(0, (width - 1).bit_length() - 16)

    def add(self, magnitudes: Any, place: Place) -> None:
        del place
        self._float = magnitudes.dtype.type
        low, high = self._float(self.state.low), self._float(self.state.high)
        inside = magnitudes[(magnitudes > low) & (magnitudes <= high)]
        bits = inside.view(_integer(self._float)) - (self._bits(self.state.low) + 1)
        self._counts += np.bincount(bits >> self._shift(), minlength=BINS)

    def absorb(self, later: _Histogram) -> None:
        self._float = self._float or later._float
        self._counts += later._counts

    def next(self, count: Count, cap: int, elements: int) -> State:
        k = count(elements, self.state.nonzero)
        left = k - self.state.above
        total = int(self._counts.sum())
        if left > total:  # the bracket lay too high
            above, low = self.state.above + total, self.state.low
            return Bins(0.0, low, above, self.state.nonzero) if low else Resolved(0.0)
        from_top = np.cumsum(self._counts[::-1])
        place = int(np.searchsorted(from_top, left))
        chosen = BINS - 1 - place
        above = self.state.above + (int(from_top[place - 1]) if place else 0)
        shift, first = self._shift(), self._bits(self.state.low) + 1
        integer = _integer(self._float)
        low = integer(first + (chosen << shift) - 1).view(self._float)
        last = min(first + ((chosen + 1) << shift) - 1, self._bits(self.state.high))
        high = integer(last).view(self._float)
        held = int(self._counts[chosen])
        if held <= cap:
            return Between(float(low), float(high))
        if shift:
            return Bins(float(low), float(high), above, self.state.nonzero)
        return Between(float(low), float(high), (float(high),))


def _integer(kind: Any) -> Any:
    return np.int64 if kind is np.float64 else np.int32
