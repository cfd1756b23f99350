"""Task vectors without their largest changes and their smallest: what breadcrumbs leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from merge_kit.errors import ParameterError
from merge_kit.methods import order
from merge_kit.methods.base import Scan
from merge_kit.methods.dropping import check_densities
from merge_kit.methods.order import MagnitudeAt, Top
from merge_kit.methods.ranks import ascending
from merge_kit.methods.trimming import CUTS, LENGTHS, length_scan, stretches

if TYPE_CHECKING:
    from torch import Tensor

    from merge_kit.methods.base import Grain, Scans, Slab

Variant = Literal["mergekit", "paper"]


def check(densities: Sequence[float], gammas: Sequence[float]) -> None:
    """Check the shares that are kept and those that are removed from the top.

    Raises:
        ParameterError: If one is no number in [0, 1].
    """
    check_densities(densities)
    for gamma in gammas:
        if not 0 <= gamma <= 1:
            raise ParameterError(
                "gamma",
                f"is {gamma:g}, expected a number in [0, 1]",
                hint="gamma is the share of the largest changes that is removed",
            )


class Crumbs:
    """How the task vectors of a method are pruned.

    Args:
        densities: Share of each task vector that is kept; at 1 tensors are left as they are, and
            rows lose their largest elements only.
        gammas: Share of its largest elements that is removed.
        variant: "mergekit" ranks tensors, "paper" their rows.
        rescale: Whether each pruned task vector gets its L1 norm back.
    """

    def __init__(
        self,
        densities: Sequence[float],
        gammas: Sequence[float],
        variant: Variant,
        *,
        rescale: bool,
    ) -> None:
        self._pairs = list(zip(densities, gammas, strict=True))
        self._by_row, self._rescale = variant == "paper", rescale

    def residency(self) -> Grain:
        """Return "row" where rows are ranked."""
        return "row" if self._by_row else "element"

    def scans(self) -> list[Scan]:
        """Return where each task vector is cut, and the L1 norms if they are restored."""
        cuts: list[tuple[int, Top]] = []
        for i, (density, gamma) in enumerate(self._pairs):
            if 0 < density < 1 and not self._by_row:
                cuts.append((i, Top((gamma, density))))
                cuts += [(i, Top((gamma, density), without=density))] if gamma else []
        scans = [Scan(CUTS, MagnitudeAt(tuple(cuts)))] if cuts else []
        if self._rescale:
            scans.append(length_scan(self._copies, (CUTS,) if cuts else ()))
        return scans

    def _copies(self, slab: Slab, scans: Scans) -> list[Tensor]:
        return self._pruned([row.clone() for row in slab.deltas], slab, scans)

    def prune(self, slab: Slab, scans: Scans) -> list[float]:
        """Prune the task vectors of a slab in place; return the factors of their L1 norms."""
        self._pruned(list(slab.deltas), slab, scans)
        return stretches(scans, len(self._pairs))

    def _pruned(self, rows: list[Tensor], slab: Slab, scans: Scans) -> list[Tensor]:
        cuts = iter(scans.get(CUTS, ()))
        for row, (density, gamma) in zip(rows, self._pairs, strict=True):
            if density == 0:
                row.mul_(0.0)  # what is not finite shows
            elif self._by_row:
                _prune_rows(row, density, gamma, slab)
            elif density < 1:
                order.keep_top(row, next(cuts), slab)
                if gamma:
                    order.drop_top(row, next(cuts), slab)
        return rows


def _prune_rows(row: Tensor, density: float, gamma: float, slab: Slab) -> None:
    """Zero all but some of each row of a tensor: the largest but for the very largest."""
    if not slab.shape or not row.numel():
        return  # a number is left as it is
    rows = row.view(-1, slab.columns)
    removed = int(slab.columns * gamma)
    kept = min(int(slab.columns * density), slab.columns - removed)
    largest = ascending(rows.flip(1)).neg_().add_(slab.columns - 1).flip(1)  # the first of equals
    rows.scatter_(1, largest[:, :removed], 0.0)
    rows.scatter_(1, largest[:, removed + kept :], 0.0)


def scratch_bytes(models: int, elements: int) -> int:
    """Return the bytes of copies, ranks and magnitudes."""
    return 8 * (2 * models + 1) * elements + 24 * elements


__all__ = ["LENGTHS", "Crumbs", "Variant", "check", "scratch_bytes"]
