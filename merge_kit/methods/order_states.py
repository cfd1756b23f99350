"""The states on the way to a k-th magnitude, and what a pass gathers in each of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import TYPE_CHECKING, Any

from merge_kit.methods.lazy import np

if TYPE_CHECKING:
    from merge_kit.methods.reductions import Place

Count = Callable[[int, int], int]
"""How many are selected of (elements, elements that are not zero)."""

BINS = 65_536
MOST_COMMON = 4


@dataclass(frozen=True, slots=True)
class Run:
    """Magnitudes that were collected of one run of elements.

    Attributes:
        values: Those inside the bracket, but for the common ones.
        equal: How many equal each of the common ones.
    """

    place: Place
    values: Any
    equal: tuple[int, ...] = ()


class State(ABC):
    """What is known of one cut before a pass."""

    @abstractmethod
    def gathering(self, cap: int) -> Gathering:
        """Return what gathers in this state, at most `cap` elements."""


class Gathering(ABC):
    """What one chunk holds for one cut."""

    state: State
    counts_nonzero = False

    def wants(self, tensor: str, start: int, stop: int) -> bool:
        """Return whether these elements of a tensor matter."""
        del tensor, start, stop
        return True

    @abstractmethod
    def add(self, magnitudes: Any, place: Place) -> None:
        """Take in a run: a float array that is overwritten later."""

    @abstractmethod
    def absorb(self, later: Any) -> None:
        """Take in what comes after."""

    @abstractmethod
    def next(self, count: Count, cap: int, elements: int) -> State:
        """Return the state after the pass.

        Args:
            cap: Elements that may be collected.
            elements: Elements of all tensors.
        """


@dataclass(frozen=True, slots=True)
class Resolved(State):
    """The cut is found: elements that equal the threshold are taken up to an index of a tensor."""

    threshold: float
    tensor: str = ""
    index: int = 0

    def gathering(self, cap: int) -> Gathering:
        del cap
        return _Nothing(self)


EMPTY = Resolved(inf, tensor="\0")
"""Nothing is selected; a threshold of infinity alone selects what is infinite."""


class _Nothing(Gathering):
    def __init__(self, state: State) -> None:
        self.state = state

    def wants(self, tensor: str, start: int, stop: int) -> bool:
        del tensor, start, stop
        return False

    def add(self, magnitudes: Any, place: Place) -> None:
        del magnitudes, place

    def absorb(self, later: Any) -> None:
        del later

    def next(self, count: Count, cap: int, elements: int) -> State:
        del count, cap, elements
        return self.state


@dataclass(frozen=True, slots=True)
class Sampling(State):
    """Nothing is known: a sample is looked at."""

    def gathering(self, cap: int) -> Gathering:
        del cap
        return _Sample(self)


class _Sample(Gathering):
    def __init__(self, state: State) -> None:
        self.state = state
        self._runs: list[Run] = []

    def add(self, magnitudes: Any, place: Place) -> None:
        self._runs.append(Run(place, np.fmax(magnitudes, 0)))  # NaN counts as 0

    def absorb(self, later: _Sample) -> None:
        self._runs += later._runs

    def next(self, count: Count, cap: int, elements: int) -> State:
        seen: dict[str, int] = {}
        for run in self._runs:
            seen[run.place.tensor] = seen.get(run.place.tensor, 0) + run.values.size
        if sum(seen.values()) == elements:
            nonzero = sum(int(np.count_nonzero(run.values)) for run in self._runs)
            k = count(elements, nonzero)
            return resolve(self._runs, (), k) if k else EMPTY
        rates = [run.place.elements / seen[run.place.tensor] for run in self._runs]
        return _bracket(self._runs, rates, count, cap, elements)


def _bracket(
    runs: Sequence[Run], rates: Sequence[float], count: Count, cap: int, elements: int
) -> Between | Resolved:
    """Return a bracket that holds the k-th magnitude almost surely.

    Its width is five standard errors of the share above the threshold; runs of neighbours are
    alike, so the error is that of the runs' shares.

    Args:
        rates: Elements that one element of a run stands for.
    """
    values, standing = _ranked(runs, rates)
    held = int(np.count_nonzero(values))
    nonzero = round(float(standing[held - 1])) if held else 0
    k = count(elements, min(nonzero, elements))
    if k == 0 and count(elements, elements) == 0:
        return EMPTY

    def at(rank: float) -> float:
        place = int(np.searchsorted(standing, rank))
        return float(values[place]) if place < values.size else 0.0

    middle, share = at(k), k / elements
    off = [
        rate * (float(np.count_nonzero(run.values >= middle)) - share * run.values.size)
        for run, rate in zip(runs, rates, strict=True)
    ]
    spread = 5 * sqrt(sum(one * one for one in off))
    spread += 3 * elements * sqrt(share * (1 - share) / values.size) + 8 * max(rates)
    spread = min(spread, 0.45 * cap)
    high = at(k - spread) if k > spread else inf
    lower = values[values < at(k + spread)]  # the bracket leaves out its lower end
    low = float(lower[0]) if lower.size else 0.0
    return Between(low, high, _common(values[(values > low) & (values <= high)], values.size))


def _ranked(runs: Sequence[Run], rates: Sequence[float]) -> tuple[Any, Any]:
    """Return the magnitudes of a sample, falling, and the rank in all elements of each."""
    values = np.concatenate([run.values for run in runs])
    if min(rates) == max(rates):
        values = np.sort(values)[::-1]  # far faster than argsort
        return values, np.arange(1, values.size + 1) * rates[0]
    weights = np.repeat(np.asarray(rates), [run.values.size for run in runs])
    order = np.argsort(-values)
    return values[order], np.cumsum(weights[order])


def _common(inside: Any, seen: int) -> tuple[float, ...]:
    """Return the magnitudes inside a bracket that many elements have.

    Differences of bf16 models lie on a grid.
    """
    distinct, counts = np.unique(inside, return_counts=True)
    most = np.argsort(-counts, kind="stable")[:MOST_COMMON]
    return tuple(float(distinct[i]) for i in most if counts[i] >= max(16, seen / 2000))


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


@dataclass(frozen=True, slots=True)
class InRun(State):
    """The last element that is taken is the `quota`-th of those equal in the run at `place`."""

    threshold: float
    place: Place
    quota: int

    def gathering(self, cap: int) -> Gathering:
        del cap
        return _TieIndex(self)


class _TieIndex(Gathering):
    state: InRun

    def __init__(self, state: InRun) -> None:
        self.state = state
        self._index = -1

    def wants(self, tensor: str, start: int, stop: int) -> bool:
        place = self.state.place
        return tensor == place.tensor and start <= place.start < stop

    def add(self, magnitudes: Any, place: Place) -> None:
        equal = np.flatnonzero(magnitudes == magnitudes.dtype.type(self.state.threshold))
        self._index = place.start + int(equal[self.state.quota - 1])

    def absorb(self, later: _TieIndex) -> None:
        self._index = max(self._index, later._index)

    def next(self, count: Count, cap: int, elements: int) -> State:
        del count, cap, elements
        return Resolved(self.state.threshold, self.state.place.tensor, self._index + 1)
