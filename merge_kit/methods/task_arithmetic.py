"""Sums of task vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from merge_kit.methods import ops
from merge_kit.methods.base import Law, MergeMethod, PerModel, Scans, Slab
from merge_kit.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register("task_arithmetic")
@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(MergeMethod):
    """Add weighted task vectors (fine-tune minus base) to a base.

    out = base + lambda * sum(w_i (x_i - base)), divided by sum(w_i) if normalize is true

    A negative weight removes what a fine-tune learned. Weights that are all zero give the base.
    Others whose sum is zero (within 1e-6 of the sum of their magnitudes) cannot be normalised and
    are an error; mergekit leaves the sum as it is there.

    Attributes:
        weight: Weight of each task vector, any finite number.
        normalize: Whether to divide by the sum of the weights.
        lambda_: Factor on the summed task vector.

    Cost: one pass.
    Source: Ilharco et al. 2023, Editing models with task arithmetic,
        https://arxiv.org/abs/2212.04089
    """

    needs_base: ClassVar[bool] = True
    takes_base: ClassVar[bool] = True
    operates_on: ClassVar = "deltas"
    min_inputs: ClassVar[int] = 0
    error_factor: ClassVar[float] = 2.0  # the subtraction rounds too
    by_name: ClassVar[bool] = False
    laws: ClassVar[Mapping[Law, float]] = {
        "single": 2.0**-23,
        "copies_of_base": 0.0,
        "permute_models": 2.0**-20,
        "permute_rows": 0.0,
    }

    weight: PerModel[float]
    normalize: bool = False
    lambda_: float = 1.0

    def __post_init__(self) -> None:
        if self.normalize and any(self.weight):
            ops.total_weight(self.weight)

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the base plus the weighted deltas."""
        del scans
        assert slab.base is not None  # needs_base
        if not any(self.weight):
            return slab.base.clone()
        factor = self.lambda_ / (ops.total_weight(self.weight) if self.normalize else 1.0)
        return ops.weighted_sum(slab.deltas, [w * factor for w in self.weight], slab.base)
