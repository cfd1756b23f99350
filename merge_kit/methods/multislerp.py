"""A weighted mean of directions, with the weighted mean of the lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from merge_kit.errors import ParameterError
from merge_kit.methods import mixing
from merge_kit.methods.base import Law, MergeMethod, PerModel, Scan, Scans, Slab
from merge_kit.methods.directions import MeanDirection
from merge_kit.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST = 1e100  # squares of weights are summed


@register("multislerp")
@dataclass(frozen=True, kw_only=True)
class MultiSlerp(MergeMethod):
    """Average directions and lengths of models apart, or those of their task vectors.

    out = sum(w_i |x_i|) * m / |m|, m = sum(w_i x_i / |x_i|), a tensor at a time;
    w_i divided by sum(w_i) if normalize_weights is true

    With a base, x_i is model i minus the base, and the result is added to the base. It is what
    mergekit computes: there a step in the tangent space at m follows, which is always zero. So it
    is no slerp: of two models the angle is divided by t only at t = 0.5. `karcher` is exact.

    A single model is the result as it is, whatever its weight. Zero vectors (of a length below
    1e-150) have no direction and no length. Where the directions balance (|m| <= eps: opposite
    models of equal weight, for example) there is no direction to take, and the result is
    sum(w_i x_i); mergekit does that for two models and stops with an error for more. Weights
    whose sum is zero (within 1e-6 of the sum of their magnitudes) cannot be normalised and are an
    error; mergekit divides by it. mergekit also adds eps to each length, so that vectors that are
    not much longer than eps count less.

    Attributes:
        weight: Weight of each model, any finite number (within 1e100 if they are not normalised).
        normalize_weights: Whether to divide by the sum of the weights.
        eps: Length of m up to which it has no direction, from 0.

    Cost: two passes (three where the directions nearly balance).
    Source: Goddard 2025, Multi-SLERP, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea
    """

    takes_base: ClassVar[bool] = True
    operates_on: ClassVar = "deltas"
    error_factor: ClassVar[float] = 2.0  # the subtraction rounds, and the factors do
    laws: ClassVar[Mapping[Law, float]] = {
        "single": 2.0**-22,
        "copies": 2.0**-22,
        "copies_of_base": 0.0,
        "permute_models": 2.0**-20,
        "permute_rows": 2.0**-20,
    }

    weight: PerModel[float]
    normalize_weights: bool = True
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not self.eps >= 0:
            raise ParameterError("eps", f"is {self.eps:g}, expected a number from 0")
        if len(self.weight) > 1:
            self._weights()

    def _weights(self) -> tuple[float, ...]:
        if not self.normalize_weights:
            largest = max(map(abs, self.weight))
            if largest > _LARGEST:
                problem = f"is {largest:g} in magnitude, expected at most {_LARGEST:g}"
                raise ParameterError("weight", problem, hint="set normalize_weights: true")
            return tuple(self.weight)
        return tuple(mixing.shares(self.weight, "normalize_weights"))

    def copies(self) -> bool:
        """Return whether there is one model only."""
        return len(self.weight) == 1

    def scans(self) -> Sequence[Scan]:
        """Return the factors of the models."""
        if len(self.weight) < 2:
            return []
        return [Scan("factors", MeanDirection(self._weights(), self.eps))]

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the sum with these factors; overwrites the models."""
        factors = [1.0] if len(self.weight) == 1 else scans["factors"]
        return mixing.weighted_sum(slab.deltas, factors, slab.base)
