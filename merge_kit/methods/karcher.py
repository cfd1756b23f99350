"""The Riemannian mean of models on a sphere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, ClassVar

from merge_kit.errors import ParameterError
from merge_kit.methods import mixing
from merge_kit.methods.base import Law, MergeMethod, PerModel, Scan, Scans, Slab, per_model
from merge_kit.methods.directions import MeanDirection
from merge_kit.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor

BALANCED = 1e-6
"""Length of a mean of unit vectors up to which it has no direction."""


@register("karcher")
@dataclass(frozen=True, kw_only=True)
class Karcher(MergeMethod):
    """Karcher (Fréchet) mean of models on the sphere: as slerp, but of any number, in no order.

    out = sum(v_i |x_i|) * p, v_i = w_i / sum(w_j), u_i = x_i / |x_i|, a tensor at a time;
    p starts at m / |m|, m = sum(v_i u_i), and moves max_iter times along
    T = sum(v_i theta_i / sin(theta_i) (u_i - cos(theta_i) p)), theta_i the angle of u_i and p:
    p <- cos(|T|) p + sin(|T|) T / |T|, until |T| < tol

    A base (base_model) lends config and tokenizer and is none of the points, listed or not;
    mergekit averages it in. Zero vectors (of a length below 1e-150) have no direction and count
    only in the length of the result; to mergekit they are those shorter than tol. Where the
    models balance (|m| <= 1e-6: opposite ones, for example) any direction would do, and the
    result is their weighted mean; mergekit takes the direction of the model that is listed first.
    A point opposite to p (to 1e-4 in the sine of the angle) does not pull it. 0-d tensors are
    vectors of length 1.

    Attributes:
        weight: Weight of each model, from 0, not all 0; only their ratios count (mergekit: all
            equal).
        max_iter: Most steps, from 0; 0 gives the direction of m.
        tol: Shortest step that is taken, in radians, from 0.

    Cost: two passes (three where the models nearly balance).
    Source: Karcher 1977, Riemannian center of mass and mollifier smoothing,
        https://doi.org/10.1002/cpa.3160300502; as a merge of models:
        https://arxiv.org/abs/2603.04972
    """

    takes_base: ClassVar[bool] = True
    error_factor: ClassVar[float] = 2.0  # the factors round too
    laws: ClassVar[Mapping[Law, float]] = {
        "single": 0.0,
        "copies": 2.0**-22,
        "copies_of_base": 2.0**-22,
        "permute_models": 2.0**-20,
        "permute_rows": 2.0**-20,
    }

    weight: PerModel[float] = per_model(1.0)
    max_iter: int = 10
    tol: float = 1e-5

    def __post_init__(self) -> None:
        for weight in self.weight:
            if not weight >= 0:
                raise ParameterError("weight", f"is {weight:g}, expected a number from 0")
        if self.weight and not any(self.weight):
            hint = "give at least one model a weight above 0"
            raise ParameterError("weight", "of every model is 0", hint=hint)
        if not isfinite(sum(self.weight)):
            problem = f"of the models sums to {sum(self.weight):g}, expected a finite sum"
            raise ParameterError("weight", problem, hint="only their ratios count")
        if self.max_iter < 0:
            raise ParameterError("max_iter", f"is {self.max_iter}, expected a number from 0")
        if not self.tol >= 0:
            raise ParameterError("tol", f"is {self.tol:g}, expected a number from 0")

    def scans(self) -> Sequence[Scan]:
        """Return the factors of the models."""
        total = sum(self.weight)
        weights = tuple(w / total for w in self.weight)
        mean = MeanDirection(weights, BALANCED, steps=self.max_iter, tolerance=self.tol)
        return [Scan("factors", mean)]

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the sum with these factors; overwrites the models."""
        return mixing.weighted_sum(slab.tensors, scans["factors"])
