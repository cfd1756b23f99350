"""Exact order statistics of magnitudes: the k-th largest of a tensor or of a whole model.

No sort of everything: a sample brackets the k-th magnitude, one pass counts what lies above the
bracket and collects what lies inside, a partition finds it. Where the bracket misses or holds too
much, passes over bit patterns narrow it. The result is exact either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, inf, nextafter
from typing import TYPE_CHECKING, Any, cast

from merge_kit.methods.lazy import np, torch
from merge_kit.methods.order_samples import Sampling
from merge_kit.methods.order_states import EMPTY, Gathering, Resolved, State
from merge_kit.methods.reductions import Accumulator, Again, Done, Place, Reduction

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

    from merge_kit.methods.base import Slab
    from merge_kit.methods.reductions import Rows

CANDIDATES = 6_000_000
"""Elements that are collected at most for one tensor, over all cuts."""

FEWEST = 200_000
"""Elements that may be collected for each cut, however many there are."""

PIECE = 262_144
"""Elements that are looked at together."""

ALL = 2**62


@dataclass(frozen=True, slots=True)
class Top:
    """A number of the largest elements, as shares of them.

    k = sum of int(share * n), at least `least` if any share is above 0, at most n; less
    int(without * n).

    Attributes:
        shares: Each in [0, 1].
        least: Fewest elements.
        of_nonzero: Whether n counts only elements that are not zero.
        without: Share that is taken off again, at most one of `shares`.
    """

    shares: tuple[float, ...]
    least: int = 0
    of_nonzero: bool = False
    without: float = 0.0

    def count(self, elements: int, nonzero: int) -> int:
        """Return k."""
        n = nonzero if self.of_nonzero else elements
        k = sum(int(share * n) for share in self.shares)
        k = min(n, max(k, self.least if any(self.shares) else 0))
        return k - int(self.without * n)


@dataclass(frozen=True, slots=True)
class Quantile:
    """The element at ascending index floor(q * (n - 1)), q in [0, 1]."""

    q: float
    of_nonzero: bool = False

    def count(self, elements: int, nonzero: int) -> int:
        """Return its place from the top, starting at 1; 0 if there are no elements."""
        n = nonzero if self.of_nonzero else elements
        return n - floor(self.q * (n - 1)) if n else 0


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a selection of the largest magnitudes ends.

    Elements above the threshold are selected, and of those that equal it the first ones: by index
    in the flattened tensor, and over a whole model by tensors in the order of the output.

    Attributes:
        threshold: The k-th largest magnitude; inf also for k = 0, 0.0 where everything but zeros is
            selected.
        tensor: The tensor inside which equal magnitudes are cut; "" if all of them are selected.
        index: In that tensor, those below this index are selected.
        before: Tensors whose equal magnitudes are all selected, where some are not.
    """

    threshold: float
    tensor: str = ""
    index: int = ALL
    before: frozenset[str] = frozenset()

    def index_in(self, tensor: str) -> int:
        """Return the index below which elements equal to the threshold are selected."""
        if not self.tensor or tensor in self.before:
            return ALL
        return self.index if tensor == self.tensor else 0


NOTHING = Cut(inf, tensor="\0", index=0)


@dataclass(frozen=True, slots=True)
class MagnitudeAt(Reduction):
    """For each cut, the k-th largest magnitude of one of the rows that are scanned.

    Attributes:
        cuts: (row, how many of its largest elements), one or more.
    """

    cuts: tuple[tuple[int, Top | Quantile], ...]

    def accumulator(self, carry: Any) -> Accumulator:
        """Return what gathers for the cuts that are not found yet."""
        states = carry or (Sampling(),) * len(self.cuts)
        return Orders(self.cuts, states, self._cap())

    def _cap(self) -> int:
        """Return how many elements are collected at most for each cut."""
        return max(CANDIDATES // max(1, len(self.cuts)), FEWEST)

    def samples(self, carry: Any) -> bool:
        """Return whether this is the first pass."""
        return carry is None

    def held_bytes(self, elements: int) -> int:
        """Return the bytes of candidates (and of a copy while they are sorted)."""
        return 8 * len(self.cuts) * min(self._cap(), elements) + 8_000_000

    def finish(self, total: Any, carry: Any) -> Done | Again:
        """Return a `Cut` for each of the cuts, or what the next pass looks for."""
        del carry
        gathered = cast("Orders", total)
        states = tuple(
            part.state
            if isinstance(part.state, Resolved)
            else part.next(how.count, gathered.cap, gathered.elements)
            for part, (_, how) in zip(gathered.parts, self.cuts, strict=True)
        )
        if not all(isinstance(state, Resolved) for state in states):
            return Again(states)
        found = (cast("Resolved", state) for state in states)
        return Done(tuple(_cut(one, gathered.tensors) for one in found))


def _cut(found: Resolved, tensors: dict[str, int]) -> Cut:
    if found == EMPTY:
        return NOTHING
    if not found.tensor:
        return Cut(found.threshold)
    names = list(tensors)
    before = frozenset(names[: names.index(found.tensor)])
    return Cut(found.threshold, found.tensor, found.index, before)


class Orders(Accumulator):
    """What one chunk holds for each cut.

    Attributes:
        tensors: Elements of each tensor that was seen, in order.
    """

    def __init__(
        self, cuts: Sequence[tuple[int, Top | Quantile]], states: tuple[State, ...], cap: int
    ) -> None:
        self.tensors: dict[str, int] = {}
        self.cap = cap
        self.parts: list[Gathering] = [state.gathering(cap) for state in states]
        for part, (_, how) in zip(self.parts, cuts, strict=True):
            part.counts_nonzero = how.of_nonzero
        self._rows = [row for row, _ in cuts]
        self._magnitudes = torch.empty(0)

    @property
    def elements(self) -> int:
        """Elements of all tensors that were seen."""
        return sum(self.tensors.values())

    def add(self, values: Rows, place: Place) -> None:
        """Take in a run of each row, in pieces that stay in the cache."""
        self.tensors.setdefault(place.tensor, place.elements)
        elements = values[0].shape[0]
        for start in range(0, elements, PIECE):
            stop = min(start + PIECE, elements)
            here = Place(place.tensor, place.start + start, place.elements)
            self._add([row[start:stop] for row in values], here, place.start + stop)

    def _add(self, values: Rows, place: Place, stop: int) -> None:
        wanting = [part.wants(place.tensor, place.start, stop) for part in self.parts]
        for row in dict.fromkeys(r for r, due in zip(self._rows, wanting, strict=True) if due):
            magnitudes = torch.abs(values[row], out=self._room(values[row])).numpy()
            for other, part, due in zip(self._rows, self.parts, wanting, strict=True):
                if due and other == row:
                    part.add(magnitudes, place)

    def _room(self, row: Tensor) -> Tensor:
        if self._magnitudes.numel() < row.numel() or self._magnitudes.dtype != row.dtype:
            self._magnitudes = torch.empty(row.shape, dtype=row.dtype)
        return self._magnitudes[: row.numel()]

    def wants(self, tensor: str, start: int, stop: int) -> bool:
        """Return whether any cut needs these elements."""
        return any(part.wants(tensor, start, stop) for part in self.parts)

    def skip(self, place: Place) -> None:
        """Note that a run was left out."""
        self.tensors.setdefault(place.tensor, place.elements)

    def absorb(self, later: Self) -> None:
        """Take in what comes after."""
        for tensor, elements in later.tensors.items():
            self.tensors.setdefault(tensor, elements)
        for mine, other in zip(self.parts, later.parts, strict=True):
            mine.absorb(other)


def keep_top(row: Tensor, cut: Cut, slab: Slab) -> Tensor:
    """Set to zero what a cut does not select of one row of a slab, in place.

    Args:
        row: (elements,), the elements of the slab.
        cut: Found by a scan of the tensor, or of the model, that holds the slab.
        slab: Says where the row lies.
    """
    return keep_largest(row, cut, slab.name, slab.offset)


def keep_largest(row: Tensor, cut: Cut, tensor: str, offset: int) -> Tensor:
    """Set to zero, in place, what a cut does not select of the elements from `offset` on."""
    if cut.threshold == 0.0:
        return row
    at = min(max(cut.index_in(tensor) - offset, 0), row.numel())
    if at:
        _shrink(row[:at], below(cut.threshold, row))
    if at < row.numel():
        _shrink(row[at:], cut.threshold)
    return row


def drop_top(row: Tensor, cut: Cut, slab: Slab) -> Tensor:
    """Set to zero what a cut selects of one row of a slab, in place."""
    return row.sub_(keep_top(row.clone(), cut, slab))


def below(threshold: float, like: Tensor) -> float:
    """Return the next smaller number of the dtype of a tensor."""
    if like.dtype == torch.float64:
        return nextafter(threshold, -inf)
    return float(np.nextafter(np.float32(threshold), np.float32(-inf)))


def _shrink(values: Tensor, threshold: float) -> None:
    """Set to zero, in place, what is not above a threshold in magnitude."""
    torch.ops.aten.hardshrink.out(values, threshold, out=values)


__all__ = ["Cut", "MagnitudeAt", "Quantile", "Top", "drop_top", "keep_top"]
