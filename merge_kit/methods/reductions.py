"""Statistics over whole tensors or models, gathered slab by slab in bounded memory.

A reduction is gathered in chunks of `CHUNK` elements that do not depend on slab size or threads;
within a chunk in blocks of `BLOCK`. Chunks are absorbed in order, so every sum has one order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from math import asin, atan2, pi, sqrt
from typing import TYPE_CHECKING, Any, TypeVar

from merge_kit.core.tensors import BLOCK
from merge_kit.methods.lazy import torch

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

CHUNK = 64 * BLOCK
"""Elements that one accumulator sees, at most; fixed, so that sums have one order."""


class Accumulator(ABC):
    """What one chunk has gathered."""

    @abstractmethod
    def add(self, values: Tensor) -> None:
        """Take in (k, elements): whole blocks, but for the last of the tensor."""

    @abstractmethod
    def absorb(self, later: Self) -> None:
        """Take in what the next chunk gathered."""


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


A = TypeVar("A", bound=Accumulator)


def blocks(values: Tensor) -> Iterator[Tensor]:
    """Yield (k, BLOCK) views of (k, elements), the last one shorter."""
    for start in range(0, max(values.shape[-1], 1), BLOCK):
        yield values[:, start : start + BLOCK]


class _Sums(Accumulator):
    """A float64 tensor of sums, block by block."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def _plus(self, more: Tensor) -> None:
        self.total = more if self.total is None else self.total.add_(more)

    def absorb(self, later: Self) -> None:
        if later.total is not None:
            self._plus(later.total)


class _GramSums(_Sums):
    def add(self, values: Tensor) -> None:
        k = values.shape[0]
        for block in blocks(values):
            wide = block.double()
            gram = torch.empty(k, k, dtype=torch.float64)
            for i in range(k):
                for j in range(i, k):
                    gram[i, j] = gram[j, i] = torch.dot(wide[i], wide[j])
            self._plus(gram)


@dataclass(frozen=True, slots=True)
class Gram(Reduction):
    """All dot products: (k, k), float64, of the k rows that are scanned."""

    def accumulator(self, carry: Any) -> Accumulator:
        del carry
        return _GramSums()

    def finish(self, total: Any, carry: Any) -> Done:
        del carry
        return Done(total.total)


class _PairSums(_GramSums):
    """The Gram matrix of a pair, or on the second pass the squared length of u + v."""

    def __init__(self, lengths: tuple[float, float] | None) -> None:
        super().__init__()
        self._lengths = lengths

    def add(self, values: Tensor) -> None:
        if self._lengths is None:
            super().add(values)
            return
        for block in blocks(values):
            wide = block.double()
            both = (wide[0] / self._lengths[0]).add_(wide[1] / self._lengths[1])
            self._plus(torch.dot(both, both).reshape(1))


@dataclass(frozen=True, slots=True)
class Angle(Reduction):
    """The angle between the two rows that are scanned, in radians; None if one is zero.

    Close to opposite rows take a second pass: there the cosine says too little about the angle.
    """

    def accumulator(self, carry: Any) -> Accumulator:
        return _PairSums(carry)

    def finish(self, total: Any, carry: Any) -> Done | Again:
        if carry is not None:
            return Done(pi - 2 * asin(min(1.0, sqrt(float(total.total)) / 2)))
        (aa, ab), (_, bb) = total.total.tolist()
        if aa <= 0 or bb <= 0:
            return Done(None)
        cosine = ab / (sqrt(aa) * sqrt(bb))
        if cosine < -0.9:
            return Again((sqrt(aa), sqrt(bb)))
        sine = sqrt(max(0.0, (1 - cosine) * (1 + cosine)))
        return Done(atan2(sine, cosine))


class _RowSums(_Sums):
    def add(self, values: Tensor) -> None:
        for block in blocks(values):
            wide = block.double()
            self._plus(torch.stack([row.sum() for row in wide]))


@dataclass(frozen=True, slots=True)
class Sum(Reduction):
    """The sum of each of the k rows that are scanned: (k,), float64."""

    def accumulator(self, carry: Any) -> Accumulator:
        del carry
        return _RowSums()

    def finish(self, total: Any, carry: Any) -> Done:
        del carry
        return Done(total.total)
