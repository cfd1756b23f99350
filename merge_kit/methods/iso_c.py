"""The sum of task vectors with a flat spectrum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot
from typing import TYPE_CHECKING, ClassVar, Literal

from merge_kit.methods import spectral
from merge_kit.methods.base import Grain, Law, MergeMethod, PerModel, Scans, Slab, per_model
from merge_kit.methods.dropping import fill
from merge_kit.methods.lazy import torch
from merge_kit.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register("iso_c")
@dataclass(frozen=True, kw_only=True)
class IsoC(MergeMethod):
    """Give the sum of the task vectors singular values that are all alike (Iso-C).

    sum(w_i d_i) = U S V^T, out = base + lambda * mean(S) U V^T

    No task then dominates the directions that tasks share. Singular values that are only the
    rounding of float32 have no vectors, so that a sum of low rank stays of low rank. The mean is
    over all min(rows, columns) values, zeros included, as the authors take it; mean_over rank takes
    it over those that have vectors, which is the one to use for low ranks (LoRA; named as
    adapters, as tsv says). Matrices are as in tsv. What is no matrix is base + other_weight *
    sum(w_i d_i).

    Scope: each matrix. Vote: none. Normalisation: none.

    Differences: mergekit has no such method. The authors' code keeps arbitrary directions where the
    sum has none: noise of 1e-12 can change its result by all its length. They tune lambda on
    validation data; fusion_bench takes 1.5.

    Attributes:
        weight: Weight of each task vector, any finite number.
        lambda_: Factor on the merged task vector.
        mean_over: all or rank: the singular values that are averaged.
        other_weight: Factor on the sum of task vectors of what is no matrix; by default lambda
            divided by the number of models whose weight is not 0.

    Cost: whole tensors in float64; for each matrix one singular value decomposition: minutes per
        billion parameters, as the plan says.
    Source: Marczak et al. 2025, No task left behind, https://arxiv.org/abs/2502.04959
    """

    needs_base: ClassVar[bool] = True
    takes_base: ClassVar[bool] = True
    operates_on: ClassVar = "deltas"
    grain: ClassVar[Grain] = "tensor"
    min_inputs: ClassVar[int] = 1
    error_factor: ClassVar[float] = 16.0  # rounding of the task vectors turns singular vectors
    laws: ClassVar[Mapping[Law, float]] = {
        "copies_of_base": 0.0,
        "permute_models": 2.0**-18,
        "permute_rows": 2.0**-18,
    }

    weight: PerModel[float] = per_model(1.0)
    lambda_: float = 1.0
    mean_over: Literal["all", "rank"] = "all"
    other_weight: float | None = None

    def __post_init__(self) -> None:
        fill(self, len(self.weight))

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the base plus the merged task vector."""
        del scans
        weights = self.weight or (1.0,) * len(slab.deltas)
        return spectral.merged(slab, weights, self.lambda_, self.other_weight, self._solve)

    def _solve(self, deltas: list[Tensor], floors: list[float], name: str) -> Tensor:
        total = deltas[0]
        for delta in deltas[1:]:
            total.add_(delta)
        parts = spectral.decompose(total, hypot(*floors), name)
        if not len(parts.values):
            return torch.zeros_like(total)
        count = len(parts.values) if self.mean_over == "rank" else min(total.shape)
        return (parts.left @ parts.right).mul_(float(parts.values.sum()) / count)

    def scratch_bytes(self, models: int, elements: int) -> int:
        """Return the bytes of task vectors, singular vectors and work space in float64."""
        return 8 * elements * (models + 12)  # one decomposition; measured: 9 of these 14 for 2

    def flops(self, name: str, shape: tuple[int, ...], models: int) -> float:
        """Return the operations of one decomposition."""
        del models
        return spectral.svd_flops(shape, name)
