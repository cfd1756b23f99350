"""A sample, from which the bracket around a k-th magnitude is guessed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import TYPE_CHECKING, Any

from merge_kit.methods.lazy import np
from merge_kit.methods.order_brackets import Between, resolve
from merge_kit.methods.order_states import EMPTY, Count, Gathering, Resolved, Run, State

if TYPE_CHECKING:
    from merge_kit.methods.reductions import Place

MOST_COMMON = 4


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
