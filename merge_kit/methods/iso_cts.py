"""A flat spectrum over directions that tasks share, and some of each task's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot
from typing import TYPE_CHECKING, ClassVar

from merge_kit.errors import ParameterError
from merge_kit.methods import spectral
from merge_kit.methods.base import Grain, Law, MergeMethod, PerModel, Scans, Slab, per_model
from merge_kit.methods.dropping import fill
from merge_kit.methods.lazy import torch
from merge_kit.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register("iso_cts")
@dataclass(frozen=True, kw_only=True)
class IsoCTS(MergeMethod):
    """Flatten the spectrum of shared directions and of some that each task has alone (Iso-CTS).

    sum(w_i d_i) = U S V^T, U_c S_c V_c^T its first c directions,
    (1 - U_c U_c^T) w_i d_i = U_i S_i V_i^T, of each the first t directions,
    out = base + lambda * mean(S_c, S_1 ... S_n) P([U_c U_1 ... U_n]) P([V_c V_1 ... V_n])^T

    t is (k - int(common k)) / models, rounded, with k = min(rows, columns), and c what is left of
    k. P is the nearest matrix with orthonormal columns, without directions that the vectors do not
    span. Singular values that are only the rounding of float32 have no vectors; in the mean they
    count as 0. Matrices are as in tsv. What is no matrix is base + other_weight * sum(w_i d_i).

    Scope: each matrix. Vote: none. Normalisation: none.

    Differences: mergekit has no such method. The authors' code keeps arbitrary directions where
    task vectors have none. They tune lambda on validation data; fusion_bench takes 1.5.

    Attributes:
        weight: Weight of each task vector, any finite number; 0 leaves it out.
        common: Share of the directions that come from the sum, in [0, 1].
        lambda_: Factor on the merged task vector.
        other_weight: Factor on the sum of task vectors of what is no matrix; by default lambda
            divided by the number of models whose weight is not 0.

    Cost: whole tensors in float64; for each matrix a singular value decomposition a model, and
        three more: minutes per billion parameters, as the plan says.
    Source: Marczak et al. 2025, No task left behind, https://arxiv.org/abs/2502.04959
    """

    needs_base: ClassVar[bool] = True
    takes_base: ClassVar[bool] = True
    operates_on: ClassVar = "deltas"
    grain: ClassVar[Grain] = "tensor"
    min_inputs: ClassVar[int] = 1
    error_factor: ClassVar[float] = 32.0  # rounding of the task vectors turns singular vectors
    laws: ClassVar[Mapping[Law, float]] = {
        "copies_of_base": 0.0,
        "permute_models": 2.0**-17,
        "permute_rows": 2.0**-17,
    }

    weight: PerModel[float] = per_model(1.0)
    common: float = 0.8
    lambda_: float = 1.0
    other_weight: float | None = None

    def __post_init__(self) -> None:
        fill(self, len(self.weight))
        if not 0 <= self.common <= 1:
            problem = f"is {self.common:g}, expected a number in [0, 1]"
            raise ParameterError("common", problem, hint="it is a share of the directions")

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the base plus the merged task vector."""
        del scans
        weights = self.weight or (1.0,) * len(slab.deltas)
        return spectral.merged(slab, weights, self.lambda_, self.other_weight, self._solve)

    def _solve(self, deltas: list[Tensor], floors: list[float], name: str) -> Tensor:
        size, tasks = min(deltas[0].shape), len(deltas)
        own = round((size - int(size * self.common)) / tasks)
        own = min(own, size // tasks)
        shared = size - own * tasks
        total = torch.zeros_like(deltas[0])
        for delta in deltas:
            total.add_(delta)
        noise = hypot(*floors)
        parts = [spectral.decompose(total, noise, name).first(shared)]
        lead = parts[0].left
        for delta in deltas:
            # The shared directions are as noisy as the sum, and what cancels leaves that behind.
            least = max(noise, spectral.NOISE * spectral.norm(delta))
            rest = delta.sub_(lead @ (lead.T @ delta))
            parts.append(spectral.decompose(rest, least, name).first(own))
        values = torch.cat([part.values for part in parts])
        if not len(values):
            return torch.zeros_like(total)
        left = spectral.nearest_orthogonal(torch.cat([part.left for part in parts], dim=1), name)
        right = spectral.nearest_orthogonal(torch.cat([part.right for part in parts]), name)
        return (left @ right).mul_(float(values.sum()) / size)

    def scratch_bytes(self, models: int, elements: int) -> int:
        """Return the bytes of task vectors, singular vectors and work space in float64."""
        return spectral.scratch_bytes(models, elements)

    def flops(self, name: str, shape: tuple[int, ...], models: int) -> float:
        """Return the operations of a decomposition a model and three more."""
        return spectral.svd_flops(shape, name) * (models + 3)
