"""Task vectors without their largest and smallest changes, added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from merge_kit.methods import crumbs, ops
from merge_kit.methods.base import Grain, Law, MergeMethod, PerModel, Scan, Scans, Slab, per_model
from merge_kit.methods.dropping import fill
from merge_kit.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register("breadcrumbs")
@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(MergeMethod):
    """Remove the largest and the smallest changes of each task vector and add up the rest.

    out = base + lambda * sum(w_i c_i), divided by sum(w_i) if normalize is true,
    c_i = d_i = x_i - base without its int(gamma_i n) elements of the largest magnitude, of which
    the int(density_i n) next largest are kept

    Where gamma and density make more than 1, fewer of the largest are removed. At density 1 the
    task vector is left as it is, whatever gamma (not in variant paper). Of equal magnitudes the
    first elements count as the larger ones.

    Scope: each tensor by itself (variant paper: each row). Vote: none. Normalisation: the sum of
    the weights, off; weights that cancel cannot be normalised and are an error.

    Differences: older versions of mergekit drop all changes of tensors with fewer than 1/gamma
    elements. variant paper ranks each row (last axis; a vector is one row, a number is kept): its
    int(gamma c) largest elements are removed, and the int(density c) next largest of its c elements
    are kept.

    Attributes:
        weight: Weight of each task vector, any finite number.
        density: Share of each task vector that is kept, in [0, 1].
        gamma: Share of the largest changes that is removed, in [0, 1].
        normalize: Whether to divide by the sum of the weights.
        rescale: Whether to give each pruned task vector its L1 norm back, a tensor at a time.
        lambda_: Factor on the summed task vector.
        variant: mergekit (tensors are ranked) or paper (rows are).

    Cost: two passes and a sample of the files, one pass for rows (which are sorted); one more to
        rescale.
    Source: Davari and Belilovsky 2023, Model breadcrumbs, https://arxiv.org/abs/2312.06795
    """

    needs_base: ClassVar[bool] = True
    takes_base: ClassVar[bool] = True
    operates_on: ClassVar = "deltas"
    min_inputs: ClassVar[int] = 0
    error_factor: ClassVar[float] = 2.0  # the subtraction rounds too
    laws: ClassVar[Mapping[Law, float]] = {
        "single": 2.0**-22,
        "copies_of_base": 0.0,
        "permute_models": 2.0**-20,
        "permute_rows": 0.0,
    }

    weight: PerModel[float]
    density: PerModel[float] = per_model(1.0)
    gamma: PerModel[float] = per_model(0.01)
    normalize: bool = False
    rescale: bool = False
    lambda_: float = 1.0
    variant: Literal["mergekit", "paper"] = "mergekit"

    def __post_init__(self) -> None:
        fill(self, len(self.weight))
        crumbs.check(self.density, self.gamma)
        if self.normalize and any(self.weight):
            ops.total_weight(self.weight)

    def _crumbs(self) -> crumbs.Crumbs:
        return crumbs.Crumbs(self.density, self.gamma, self.variant, rescale=self.rescale)

    def residency(self) -> Grain:
        """Return "row" where rows are ranked."""
        return self._crumbs().residency()

    def scans(self) -> Sequence[Scan]:
        """Return where task vectors are cut, and their L1 norms if they are restored."""
        return self._crumbs().scans()

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the base plus what is kept of the weighted task vectors."""
        assert slab.base is not None  # needs_base
        if not any(self.weight):
            return slab.base.clone()
        stretches = self._crumbs().prune(slab, scans)
        factor = self.lambda_ / (ops.total_weight(self.weight) if self.normalize else 1.0)
        weights = [w * factor * s for w, s in zip(self.weight, stretches, strict=True)]
        return ops.weighted_sum(slab.deltas, weights, slab.base)

    def scratch_bytes(self, models: int, elements: int) -> int:
        """Return the bytes of copies and ranks, where there are any."""
        wide = self.rescale or self.variant == "paper"
        return crumbs.scratch_bytes(models, elements) if wide else 8 * elements
