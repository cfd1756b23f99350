"""Spherical interpolation by weights, of models or of task vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, ClassVar

from merge_kit.errors import ParameterError
from merge_kit.methods import arcs, mixing
from merge_kit.methods.base import Grain, Law, MergeMethod, PerModel, Scan, Scans, Slab
from merge_kit.methods.reductions import Angle
from merge_kit.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register("nuslerp")
@dataclass(frozen=True, kw_only=True)
class NuSlerp(MergeMethod):
    """Spherical linear interpolation of two models by weights, or of their task vectors.

    out = sin((1-t) theta)/sin(theta) * x_1 + sin(t theta)/sin(theta) * x_2,
    t = w_2 / (w_1 + w_2), theta the angle between x_1 and x_2

    With a base, x_i is model i minus the base, and the result is added to the base. Weights whose
    sum is below 1e-6 in magnitude (both zero, or opposite) give t = 0.5. t outside [0, 1] (one
    weight is negative) goes on along the arc.

    What is one vector: the whole tensor (nuslerp_flatten, the default; nuslerp_row_wise has no
    effect then); or each vector along the last axis, w[i, :], the weights of one output of a torch
    linear layer; or with nuslerp_row_wise each vector along the first axis, w[:, j], a column of
    what torch stores. (The name means rows of the transposed matrix; recipes of mergekit keep
    their meaning.) Tensors of one axis, or none, are one vector.

    A zero vector (of a length below 1e-150), and parallel or opposite vectors
    (sin(theta) <= 1e-6), interpolate linearly; opposite ones pass through zero at t = 0.5.
    mergekit counts what is shorter than 1e-7 as shorter still, so that the angle is wrong, and
    takes opposite vectors, if rounding leaves them a sine in float32, along an arc in a direction
    that is left to rounding.

    Attributes:
        weight: Weight of each model, any finite number; only their ratio counts.
        nuslerp_flatten: Whether a tensor is one vector.
        nuslerp_row_wise: Where it is not: whether vectors lie along the first axis, not the last.

    Cost: two passes (three close to opposite); one by vectors along the last axis; one with
        whole tensors in memory by vectors along the first.
    Source: Shoemake 1985, Animating rotation with quaternion curves,
        https://doi.org/10.1145/325334.325242; the parameters are those of
        https://github.com/arcee-ai/mergekit
    """

    takes_base: ClassVar[bool] = True
    operates_on: ClassVar = "deltas"
    min_inputs: ClassVar[int] = 2
    max_inputs: ClassVar[int | None] = 2
    error_factor: ClassVar[float] = 2.0  # the subtraction rounds, and the factors do
    by_name: ClassVar[bool] = False
    laws: ClassVar[Mapping[Law, float]] = {
        "copies": 2.0**-22,
        "copies_of_base": 0.0,
        "permute_models": 2.0**-20,
        "permute_rows": 2.0**-20,
    }

    weight: PerModel[float]
    nuslerp_flatten: bool = True
    nuslerp_row_wise: bool = False

    def __post_init__(self) -> None:
        if not isfinite(sum(self.weight)):
            problem = f"of the models sums to {sum(self.weight):g}, expected a finite sum"
            raise ParameterError("weight", problem, hint="only their ratio counts")

    def residency(self) -> Grain:
        """Return what holds whole vectors: rows, or the tensor for those along the first axis."""
        if self.nuslerp_flatten:
            return "element"
        return "tensor" if self.nuslerp_row_wise else "row"

    def scans(self) -> Sequence[Scan]:
        """Return the angle between both, if tensors are whole vectors."""
        return [Scan("angle", Angle())] if self.nuslerp_flatten else []

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the interpolated slab; overwrites the models."""
        left, right = slab.deltas[0], slab.deltas[1]
        t = _share(*self.weight)
        if self.nuslerp_flatten:
            factors = arcs.coefficients(scans["angle"], t)
            return mixing.weighted_sum(slab.deltas, factors, slab.base)
        if left.numel():
            arcs.turn(self._vectors(left, slab), self._vectors(right, slab), t)
        return left if slab.base is None else left.add_(slab.base)

    def _vectors(self, flat: Tensor, slab: Slab) -> Tensor:
        """Return the elements of a slab as (vectors, elements), without a copy."""
        if self.nuslerp_row_wise:
            return flat.view(slab.shape[0] if slab.shape else 1, -1).t()
        return flat.view(-1, slab.columns)

    def scratch_bytes(self, models: int, elements: int) -> int:
        """Return the bytes of the vectors that are turned together."""
        del models
        return 4 * elements if self.nuslerp_flatten else arcs.SCRATCH_BYTES


def _share(first: float, second: float) -> float:
    total = first + second
    return 0.5 if abs(total) < 1e-6 else second / total
