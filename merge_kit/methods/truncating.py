"""What methods share whose adapters are truncated to a rank, or to a share of their energy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from merge_kit.methods.base import PerModel, Scans, Slab, Yield
from merge_kit.methods.compression import compressed, spectrum, work
from merge_kit.methods.dropping import fill
from merge_kit.methods.updates import AdapterMethod, Spectrum, Work, check_truncation


class Truncating(AdapterMethod):
    """Base of methods with the parameters `weight`, `rank` and `energy`."""

    weight: PerModel[float]
    rank: int | None
    energy: float | None

    def __post_init__(self) -> None:
        fill(self, len(self.weight))
        check_truncation(self.rank, self.energy)

    def is_fitted(self) -> bool:
        """Return whether a share of the energy is asked for."""
        return self.energy is not None

    def rank_bound(self, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        """Return the rank that is asked for, where there are so many directions."""
        most = min(self.directions(ranks, shape), *shape)
        if self.energy is not None:
            return most
        return min(most, self.default_rank(ranks) if self.rank is None else self.rank)

    def directions(self, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        """Return the most that the result can have of them before it is truncated."""
        del shape
        return sum(ranks)

    def default_rank(self, ranks: Sequence[int]) -> int:
        """Return the rank that stands for none."""
        return sum(ranks)

    def keeps(self, rank: int) -> bool:
        """Return whether truncation leaves a change of this rank alone."""
        return self.energy is None and (self.rank is None or rank <= self.rank)


class Compressing(Truncating):
    """Base of those that merge changes element by element, and so make them of full rank."""

    works_on: ClassVar = "elements"
    additive: ClassVar[bool] = False

    def directions(self, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        """Return as many as there are."""
        del ranks
        return min(shape)

    def fit(self, slab: Slab, scans: Scans) -> Sequence[Spectrum]:
        """Return the smallest rank that keeps the energy."""
        del scans
        assert self.energy is not None  # is_fitted
        return [spectrum(slab, self.energy)]

    def merge(self, slab: Slab, scans: Scans) -> Yield:
        """Return the factors of the merged change."""
        del scans
        return compressed(slab)

    def work(self, shape: tuple[int, int], ranks: Sequence[int], made: Sequence[int]) -> Work:
        """Return what a decomposition of the merged change takes."""
        del ranks
        return work(shape, made, whole=self.is_fitted())
