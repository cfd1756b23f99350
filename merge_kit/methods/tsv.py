"""Task vectors of which the leading singular vectors are kept and made orthogonal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from merge_kit.methods import spectral
from merge_kit.methods.base import Grain, Law, MergeMethod, PerModel, Scans, Slab, per_model
from merge_kit.methods.dropping import fill
from merge_kit.methods.lazy import torch
from merge_kit.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register("tsv")
@dataclass(frozen=True, kw_only=True)
class TSV(MergeMethod):
    """Keep each task's leading singular vectors and make those of all tasks orthogonal (TSV-M).

    w_i d_i = U_i S_i V_i^T, of each the first k = min(rows, columns) / models (at least 1),
    out = base + lambda * P([U_1 ... U_n]) diag(S_1 ... S_n) P([V_1 ... V_n])^T

    P is the nearest matrix with orthonormal columns, so that tasks no longer interfere. Directions
    that the vectors do not span (of equal task vectors, or of low rank) are left out; singular
    values that are only the rounding of float32 have no vectors. Task vectors are those of a weight
    matrix; convolutions are matrices of (first axis, all others), and a tensor of experts is one
    matrix each. What is no matrix (norms, biases) is base + other_weight * sum(w_i d_i).

    Vectors count as dependent within 1e-5: task vectors that differ by less are one, and those that
    differ by a little more are set apart, however little that is. The rounding of models stored in
    16 bits is part of their task vectors, which have full rank by it: name low-rank changes (LoRA)
    as adapters, model+adapter, instead of models that they were merged into.

    Scope: each matrix. Vote: none. Normalisation: none.

    Differences: mergekit has no such method. The authors' code makes up arbitrary directions where
    vectors are dependent, so that noise of 1e-13 can change the result by all its length. It
    keeps nothing of a matrix with fewer rows or columns than models. It takes the mean of what is
    no matrix, as the default does here.

    Attributes:
        weight: Weight of each task vector, any finite number; 0 leaves it out.
        lambda_: Factor on the merged task vector.
        other_weight: Factor on the sum of task vectors of what is no matrix; by default lambda
            divided by the number of models whose weight is not 0.

    Cost: whole tensors in float64; for each matrix a singular value decomposition a model, and two
        more: minutes per billion parameters, as the plan says.
    Source: Gargiulo et al. 2025, Task singular vectors, https://arxiv.org/abs/2412.00081
    """

    needs_base: ClassVar[bool] = True
    takes_base: ClassVar[bool] = True
    operates_on: ClassVar = "deltas"
    grain: ClassVar[Grain] = "tensor"
    min_inputs: ClassVar[int] = 1
    error_factor: ClassVar[float] = 16.0  # rounding of the task vectors turns singular vectors
    laws: ClassVar[Mapping[Law, float]] = {
        "single": 2.0**-20,
        "copies_of_base": 0.0,
        "permute_models": 2.0**-18,
        "permute_rows": 2.0**-18,
    }

    weight: PerModel[float] = per_model(1.0)
    lambda_: float = 1.0
    other_weight: float | None = None

    def __post_init__(self) -> None:
        fill(self, len(self.weight))

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the base plus the merged task vector."""
        del scans
        weights = self.weight or (1.0,) * len(slab.deltas)
        return spectral.merged(slab, weights, self.lambda_, self.other_weight, _solve)

    def scratch_bytes(self, models: int, elements: int) -> int:
        """Return the bytes of task vectors, singular vectors and work space in float64."""
        return spectral.scratch_bytes(models, elements)

    def flops(self, name: str, shape: tuple[int, ...], models: int) -> float:
        """Return the operations of a decomposition a model and two of all vectors."""
        return spectral.svd_flops(shape, name) * (models + 2)


def _solve(deltas: list[Tensor], floors: list[float], name: str) -> Tensor:
    count = max(1, min(deltas[0].shape) // len(deltas))
    parts = [
        spectral.decompose(delta, floor, name).first(count)
        for delta, floor in zip(deltas, floors, strict=True)
    ]
    values = torch.cat([part.values for part in parts])
    if not len(values):
        return torch.zeros_like(deltas[0])
    left = spectral.nearest_orthogonal(torch.cat([part.left for part in parts], dim=1), name)
    right = spectral.nearest_orthogonal(torch.cat([part.right for part in parts]), name)
    return (left * values) @ right
