"""Task vectors of which only the largest changes are kept, added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from merge_kit.methods import ops, trimming
from merge_kit.methods.base import Law, MergeMethod, PerModel, Scan, Scans, Slab, per_model
from merge_kit.methods.dropping import check_densities, fill
from merge_kit.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register("magnitude")
@dataclass(frozen=True, kw_only=True)
class Magnitude(MergeMethod):
    """Keep the largest changes of each task vector and add them up: magnitude pruning alone.

    out = base + lambda * sum(w_i t_i), divided by sum(w_i) if normalize is true,
    t_i = the int(density_i n) elements of d_i = x_i - base of the largest magnitude, 0 elsewhere

    It is ties without the vote. The number kept is exact, at least 1 for a density above 0; of
    equal magnitudes the first elements are kept (over the whole model: the first tensors of the
    output, and their first elements).

    Scope: each tensor by itself, or the whole model. Vote: none. Normalisation: the sum of the
    weights, off; weights that cancel cannot be normalised and are an error.

    Differences: mergekit has no such method.

    Attributes:
        weight: Weight of each task vector, any finite number.
        density: Share of each task vector that is kept, in [0, 1].
        normalize: Whether to divide by the sum of the weights.
        rescale: Whether to give each pruned task vector its L1 norm back, a tensor at a time.
        lambda_: Factor on the summed task vector.
        scope: What is ranked together, tensor or model.

    Cost: two passes and a sample of the files; one more to rescale.
    Source: Yadav et al. 2023, TIES-Merging (its figure of what pruning costs),
        https://arxiv.org/abs/2306.01708
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
    normalize: bool = False
    rescale: bool = False
    lambda_: float = 1.0
    scope: Literal["tensor", "model"] = "tensor"

    def __post_init__(self) -> None:
        fill(self, len(self.weight))
        check_densities(self.density)
        if self.normalize and any(self.weight):
            ops.total_weight(self.weight)

    def scans(self) -> Sequence[Scan]:
        """Return the cuts, and the L1 norms if they are restored."""
        cuts = trimming.cut_scan(self.density, self.scope)
        if not (self.rescale and cuts):
            return cuts
        return [*cuts, trimming.length_scan(self._trimmed, (trimming.CUTS,))]

    def _trimmed(self, slab: Slab, scans: Scans) -> list[Tensor]:
        return trimming.trimmed(slab, self.density, scans)

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the base plus what is kept of the weighted task vectors."""
        assert slab.base is not None  # needs_base
        if not any(self.weight):
            return slab.base.clone()
        trimming.trim(list(slab.deltas), self.density, scans, slab.name, slab.offset)
        factor = self.lambda_ / (ops.total_weight(self.weight) if self.normalize else 1.0)
        stretches = trimming.stretches(scans, len(self.weight))
        weights = [w * factor * s for w, s in zip(self.weight, stretches, strict=True)]
        return ops.weighted_sum(slab.deltas, weights, slab.base)

    def scratch_bytes(self, models: int, elements: int) -> int:
        """Return the bytes of trimmed copies, where they are scanned."""
        return 8 * (2 * models + 1) * elements if self.rescale else 4 * elements
