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


@dataclass(frozen=True, slots=True)
class Run:
    """Magnitudes of one tensor: all from `start` on, or those at `start + indices`."""

    tensor: str
    start: int
    values: Any
    indices: Any = None


class State(ABC):
    """What is known of one cut before a pass."""

    @abstractmethod
    def gathering(self, cap: int) -> Gathering:
        """Return what gathers in this state, at most `cap` elements."""


class Gathering(ABC):
    """What one chunk holds for one cut."""

    state: State

    def wants(self, place: Place) -> bool:
        """Return whether the run at this place matters."""
        del place
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


class _Nothing(Gathering):
    def __init__(self, state: State) -> None:
        self.state = state

    def wants(self, place: Place) -> bool:
        del place
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
        self._sizes: dict[str, int] = {}

    def add(self, magnitudes: Any, place: Place) -> None:
        self._runs.append(Run(place.tensor, place.start, np.fmax(magnitudes, 0)))  # NaN counts as 0
        self._sizes[place.tensor] = place.elements

    def absorb(self, later: _Sample) -> None:
        self._runs += later._runs
        self._sizes |= later._sizes

    def next(self, count: Count, cap: int, elements: int) -> State:
        seen: dict[str, int] = {}
        for run in self._runs:
            seen[run.tensor] = seen.get(run.tensor, 0) + run.values.size
        if sum(seen.values()) == elements:
            nonzero = sum(int(np.count_nonzero(run.values)) for run in self._runs)
            k = count(elements, nonzero)
            return resolve(self._runs, k) if k else Resolved(inf)
        rates = [self._sizes[run.tensor] / seen[run.tensor] for run in self._runs]
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
    values = np.concatenate([run.values for run in runs])
    weights = np.repeat(np.asarray(rates), [run.values.size for run in runs])
    nonzero = round(float(weights[values > 0].sum()))
    k = count(elements, min(nonzero, elements))
    if k == 0 and count(elements, elements) == 0:
        return Resolved(inf)
    order = np.argsort(-values)
    values, standing = values[order], np.cumsum(weights[order])

    def at(rank: float) -> float:
        if rank <= 0:
            return inf
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
    return Between(at(k + spread), at(k - spread))


@dataclass(frozen=True, slots=True)
class Between(State):
    """The k-th magnitude x is probably in low < x <= high, 0 <= low."""

    low: float
    high: float

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
        low, high = (magnitudes.dtype.type(x) for x in (self.state.low, self.state.high))
        above = magnitudes > high
        found = magnitudes > low
        self._above += int(np.count_nonzero(above))
        np.logical_xor(found, above, out=above)
        indices = np.flatnonzero(above)
        self._inside += indices.size
        self._nonzero += int(np.count_nonzero(magnitudes > 0)) if low > 0 else 0
        if low == 0:
            self._nonzero += int(np.count_nonzero(found))
        if indices.size and self._inside <= self._cap:
            values = magnitudes[indices]
            self._runs.append(Run(place.tensor, place.start, values, indices.astype(np.int32)))

    def absorb(self, later: _Inside) -> None:
        self._above += later._above
        self._inside += later._inside
        self._nonzero += later._nonzero
        if self._inside <= self._cap:
            self._runs += later._runs
        else:
            self._runs = []

    def next(self, count: Count, cap: int, elements: int) -> State:
        k = count(elements, self._nonzero)
        low, high = self.state.low, self.state.high
        if k == 0:
            return Resolved(inf)
        if k <= self._above:
            return Bins(high, inf, 0, self._nonzero)
        if k > self._above + self._inside:
            return Bins(0.0, low, self._above + self._inside, self._nonzero)
        if self._inside > cap:
            return Bins(low, high, self._above, self._nonzero)
        return resolve(self._runs, k - self._above)


def resolve(runs: Sequence[Run], k: int) -> Resolved:
    """Return the k-th largest of what was collected, 1 <= k <= their number."""
    values = np.concatenate([run.values for run in runs])
    threshold = np.partition(values, values.size - k)[values.size - k]
    if threshold == 0:
        return Resolved(0.0)
    quota = k - int(np.count_nonzero(values > threshold))
    if quota == int(np.count_nonzero(values == threshold)):
        return Resolved(float(threshold))
    for run in runs:
        equal = np.flatnonzero(run.values == threshold)
        if quota <= equal.size:
            at = int(equal[quota - 1])
            index = at if run.indices is None else int(run.indices[at])
            return Resolved(float(threshold), run.tensor, run.start + index + 1)
        quota -= equal.size
    raise AssertionError  # the quota is less than what equals the threshold


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
        if left > total:  # only zeros are left
            return Resolved(0.0)
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
        return Ties(float(high), k - above) if k - above < held else Resolved(float(high))


def _integer(kind: Any) -> Any:
    return np.int64 if kind is np.float64 else np.int32


@dataclass(frozen=True, slots=True)
class Ties(State):
    """The k-th magnitude is found; it takes only `quota` of the many elements that equal it."""

    threshold: float
    quota: int

    def gathering(self, cap: int) -> Gathering:
        del cap
        return _TieCounts(self)


class _TieCounts(Gathering):
    state: Ties

    def __init__(self, state: Ties) -> None:
        self.state = state
        self._runs: list[tuple[Place, int]] = []

    def add(self, magnitudes: Any, place: Place) -> None:
        equal = magnitudes == magnitudes.dtype.type(self.state.threshold)
        self._runs.append((place, int(np.count_nonzero(equal))))

    def absorb(self, later: _TieCounts) -> None:
        self._runs += later._runs

    def next(self, count: Count, cap: int, elements: int) -> State:
        del count, cap, elements
        quota = self.state.quota
        for place, found in self._runs:
            if quota <= found:
                return InRun(self.state.threshold, place, quota)
            quota -= found
        raise AssertionError  # there are more of them than the quota


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

    def wants(self, place: Place) -> bool:
        return place == self.state.place

    def add(self, magnitudes: Any, place: Place) -> None:
        equal = np.flatnonzero(magnitudes == magnitudes.dtype.type(self.state.threshold))
        self._index = place.start + int(equal[self.state.quota - 1])

    def absorb(self, later: _TieIndex) -> None:
        self._index = max(self._index, later._index)

    def next(self, count: Count, cap: int, elements: int) -> State:
        del count, cap, elements
        return Resolved(self.state.threshold, self.state.place.tensor, self._index + 1)
