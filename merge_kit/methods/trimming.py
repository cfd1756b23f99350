"""Trimming of task vectors: the largest changes are kept, of a tensor or of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from merge_kit.methods import order
from merge_kit.methods.base import Scan
from merge_kit.methods.lazy import torch
from merge_kit.methods.order import MagnitudeAt, Top
from merge_kit.methods.reductions import Sum

if TYPE_CHECKING:
    from torch import Tensor

    from merge_kit.methods.base import Scans, Slab

    Prune = Callable[[Slab, Scans], Sequence[Tensor]]

Scope = Literal["tensor", "model"]
CUTS, LENGTHS = "cuts", "lengths"


def cut_scan(densities: Sequence[float], scope: Scope) -> list[Scan]:
    """Return the scan that finds where each task vector is cut; none if nothing is to be cut.

    Of n elements, int(density * n) are kept, at least one.
    """
    cuts = tuple((i, Top((d,), least=1)) for i, d in enumerate(densities) if 0 < d < 1)
    return [Scan(CUTS, MagnitudeAt(cuts), scope=scope)] if cuts else []


def trim(
    rows: Sequence[Tensor], densities: Sequence[float], scans: Scans, tensor: str, offset: int
) -> None:
    """Set to zero, in place, what is not among the largest of each task vector.

    Args:
        rows: Task vectors, from element `offset` of a tensor on.
        scans: Holds the result of `cut_scan`.
        tensor: Its name.
    """
    cuts = iter(scans.get(CUTS, ()))
    for row, density in zip(rows, densities, strict=True):
        if density == 0:
            row.mul_(0.0)  # what is not finite shows
        elif density < 1:
            order.keep_largest(row, next(cuts), tensor, offset)


def trimmed(slab: Slab, densities: Sequence[float], scans: Scans) -> list[Tensor]:
    """Return the task vectors of a slab as `trim` leaves them, in copies."""
    rows = [row.clone() for row in slab.deltas]
    trim(rows, densities, scans, slab.name, slab.offset)
    return rows


def length_scan(prune: Prune, uses: tuple[str, ...]) -> Scan:
    """Return the scan of each task vector's L1 norm, whole and pruned: (2 * models,).

    Args:
        prune: Returns the pruned task vectors of a slab, in copies.
        uses: The scans that it reads.
    """

    def both(slab: Slab, scans: Scans) -> list[Tensor]:
        return [torch.abs(row) for row in (*slab.deltas, *prune(slab, scans))]

    return Scan(LENGTHS, Sum(), of=both, uses=uses)


def stretches(scans: Scans, models: int) -> list[float]:
    """Return the factors that give pruned task vectors their L1 norms back, 1 if not scanned."""
    if LENGTHS not in scans:
        return [1.0] * models
    found = scans[LENGTHS].tolist()
    pairs = zip(found[:models], found[models:], strict=True)
    return [whole / left if left else 1.0 for whole, left in pairs]
