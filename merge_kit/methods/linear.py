"""Weighted sums and averages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from merge_kit.methods import ops
from merge_kit.methods.base import Law, MergeMethod, PerModel, Scans, Slab
from merge_kit.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register("linear")
@dataclass(frozen=True, kw_only=True)
class Linear(MergeMethod):
    """Weighted sum or average of models ("model soup").

    out = sum(w_i x_i) / sum(w_i), or without the division if normalize is false

    The base is an ordinary input here. Weights may be negative. Weights whose sum is zero (within
    1e-6 of the sum of their magnitudes) cannot be normalised and are an error.

    Attributes:
        weight: Weight of each model, any finite number.
        normalize: Whether to divide by the sum of the weights.

    Cost: one pass.
    Source: Wortsman et al. 2022, Model soups, https://arxiv.org/abs/2203.05482
    """

    by_name: ClassVar[bool] = False
    laws: ClassVar[Mapping[Law, float]] = {
        "single": 0.0,
        "copies": 2.0**-22,
        "permute_models": 2.0**-21,
        "permute_rows": 0.0,
    }

    weight: PerModel[float]
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.normalize and self.weight:
            ops.total_weight(self.weight)

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the weighted sum."""
        del scans
        total = ops.total_weight(self.weight) if self.normalize else 1.0
        return ops.weighted_sum(slab.tensors, [w / total for w in self.weight])
