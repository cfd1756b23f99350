"""What is known of a k-th magnitude before a pass, and what a pass gathers: the first and last."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any

from merge_kit.methods.lazy import np

if TYPE_CHECKING:
    from merge_kit.methods.reductions import Place

Count = Callable[[int, int], int]
"""How many are selected of (elements, elements that are not zero)."""


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
