"""Statistics over whole tensors or models, gathered slab by slab in bounded memory.

A reduction is gathered in chunks of `CHUNK` elements that do not depend on slab size or threads;
within a chunk in blocks of `BLOCK`. Chunks are absorbed in order, so every sum has one order.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import asin, atan2, isqrt, pi, sqrt
from typing import TYPE_CHECKING, Any, TypeVar

from merge_kit.core.tensors import BLOCK
from merge_kit.methods.lazy import torch

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

    Rows = Tensor | Sequence[Tensor]
    """k rows of elements: (k, elements), or k tensors of (elements,)."""

CHUNK = 64 * BLOCK
"""Elements that one accumulator sees, at most; fixed, so that sums have one order."""


TINY_SQUARE = 1e-300
"""Squared lengths below it say nothing: float64 has lost the squares of the elements."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run of elements lies.

    Attributes:
        tensor: Name of the output tensor.
        start: Index of the first element in the flattened tensor.
        elements: Elements of the whole tensor.
    """

    tensor: str
    start: int
    elements: int


class Accumulator(ABC):
    """What one chunk has gathered."""

    @abstractmethod
    def add(self, values: Rows, place: Place) -> None:
        """Take in k rows of elements: whole blocks, but for the last of the tensor."""

    @abstractmethod
    def absorb(self, later: Self) -> None:
        """Take in what the next chunk gathered."""

    def wants(self, tensor: str, start: int, stop: int) -> bool:
        """Return whether this pass needs these elements of a tensor; others are not read."""
        del tensor, start, stop
        return True

    def skip(self, place: Place) -> None:  # noqa: B027  (most need not know)
        """Note that a run was not read."""


@dataclass(frozen=True, slots=True)
class Done:
    """The reduction's result."""

    result: Any


@dataclass(frozen=True, slots=True)
class Again:
    """Another pass is needed; `carry` is what it starts from."""

    carry: Any


class Reduction(ABC):
    """How a statistic is gathered; a frozen dataclass without state."""

    @abstractmethod
    def accumulator(self, carry: Any) -> Accumulator:
        """Return an empty accumulator; carry is None on the first pass."""

    @abstractmethod
    def finish(self, total: Any, carry: Any) -> Done | Again:
        """Return the result, or what another pass needs."""

    def samples(self, carry: Any) -> bool:
        """Return whether the pass that starts from this carry looks at a sample only."""
        del carry
        return False

    def held_bytes(self, elements: int) -> int:
        """Return the bytes that accumulators of a tensor hold at most, beyond a few numbers."""
        del elements
        return 0


A = TypeVar("A", bound=Accumulator)


_SCRATCH = threading.local()
"""Float64 blocks of each thread, used again from block to block."""


def wide_blocks(rows: Rows) -> Iterator[list[Tensor]]:
    """Yield the blocks of k rows in float64, k tensors of (BLOCK,) at a time, the last shorter.

    They are overwritten by the next ones.
    """
    buffers = _SCRATCH.__dict__.setdefault("buffers", [])
    while len(buffers) < len(rows):
        buffers.append(torch.empty(BLOCK, dtype=torch.float64))
    elements = rows[0].shape[0]
    for start in range(0, max(elements, 1), BLOCK):
        count = min(BLOCK, elements - start)
        pairs = zip(buffers, rows, strict=False)
        yield [buffer[:count].copy_(row[start : start + count]) for buffer, row in pairs]


class _Sums(Accumulator):
    """Sums of floats, block by block."""

    def __init__(self) -> None:
        self.total: list[float] = []

    def plus(self, more: list[float]) -> None:
        """Add, place by place."""
        if self.total:
            more = [have + new for have, new in zip(self.total, more, strict=True)]
        self.total = more

    def absorb(self, later: Self) -> None:
        if later.total:
            self.plus(later.total)


class _GramSums(_Sums):
    """Dot products of rows i <= j, row by row."""

    def add(self, values: Rows, place: Place) -> None:
        del place
        for wide in wide_blocks(values):
            self.plus(
                [float(torch.dot(one, other)) for i, one in enumerate(wide) for other in wide[i:]]
            )


@dataclass(frozen=True, slots=True)
class Gram(Reduction):
    """All dot products: (k, k), float64, of the k rows that are scanned."""

    def accumulator(self, carry: Any) -> Accumulator:
        del carry
        return _GramSums()

    def finish(self, total: Any, carry: Any) -> Done:
        del carry
        k = isqrt(2 * len(total.total))
        gram = torch.empty(k, k, dtype=torch.float64)
        upper = torch.triu_indices(k, k)
        gram[upper[0], upper[1]] = torch.tensor(total.total, dtype=torch.float64)
        gram[upper[1], upper[0]] = gram[upper[0], upper[1]]
        return Done(gram)


class _PairSums(_GramSums):
    """The Gram matrix of a pair, or on the second pass the squared length of u + v."""

    def __init__(self, lengths: tuple[float, float] | None) -> None:
        super().__init__()
        self._lengths = lengths

    def add(self, values: Rows, place: Place) -> None:
        if self._lengths is None:
            super().add(values, place)
            return
        for one, other in wide_blocks(values):
            both = one.div_(self._lengths[0]).add_(other.div_(self._lengths[1]))
            self.plus([float(torch.dot(both, both))])


@dataclass(frozen=True, slots=True)
class Angle(Reduction):
    """The angle between the two rows that are scanned, in radians; None if one is zero.

    A length below 1e-150 is zero here. Close to opposite rows take a second pass: there the
    cosine says too little about the angle.
    """

    def accumulator(self, carry: Any) -> Accumulator:
        return _PairSums(carry)

    def finish(self, total: Any, carry: Any) -> Done | Again:
        if carry is not None:
            return Done(pi - 2 * asin(min(1.0, sqrt(total.total[0]) / 2)))
        aa, ab, bb = total.total
        if aa < TINY_SQUARE or bb < TINY_SQUARE:
            return Done(None)
        cosine = ab / (sqrt(aa) * sqrt(bb))
        if cosine < -0.9:
            return Again((sqrt(aa), sqrt(bb)))
        sine = sqrt(max(0.0, (1 - cosine) * (1 + cosine)))
        return Done(atan2(sine, cosine))


class _RowSums(_Sums):
    def add(self, values: Rows, place: Place) -> None:
        del place
        for wide in wide_blocks(values):
            self.plus([float(row.sum()) for row in wide])


@dataclass(frozen=True, slots=True)
class Sum(Reduction):
    """The sum of each of the k rows that are scanned: (k,), float64."""

    def accumulator(self, carry: Any) -> Accumulator:
        del carry
        return _RowSums()

    def finish(self, total: Any, carry: Any) -> Done:
        del carry
        return Done(torch.tensor(total.total, dtype=torch.float64))
