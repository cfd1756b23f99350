"""Spherical interpolation of two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from merge_kit.methods import ops
from merge_kit.methods.arcs import coefficients
from merge_kit.methods.base import Grain, Law, MergeMethod, Scan, Scans, Slab
from merge_kit.methods.reductions import Angle
from merge_kit.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register("slerp")
@dataclass(frozen=True, kw_only=True)
class Slerp(MergeMethod):
    """Spherical linear interpolation between the base and one other model.

    out = sin((1-t) theta)/sin(theta) * base + sin(t theta)/sin(theta) * x,
    theta the angle between the two tensors

    The vectors keep their own lengths (they are not normalised). A zero vector (of a length below
    1e-150), and parallel or opposite tensors (sin(theta) <= 1e-6), interpolate linearly; opposite
    ones pass through zero at t = 0.5. t outside [0, 1] extrapolates along the arc. 0-d tensors are
    vectors of length 1.
    arcee-ai's mergekit already switches to linear interpolation at |cos(theta)| > 0.9995.

    More than two models: a sequence of stages, the k-th with t = w_k / (w_1 + ... + w_k); the
    result depends on the order.

    Attributes:
        t: 0 gives the base, 1 the other model; any finite number.
        flatten: Whether a tensor is one vector; false: each row (last axis) is a vector.

    Cost: two passes (three close to opposite); one where rows are vectors.
    Source: Shoemake 1985, Animating rotation with quaternion curves,
        https://doi.org/10.1145/325334.325242
    """

    needs_base: ClassVar[bool] = True
    takes_base: ClassVar[bool] = True
    max_inputs: ClassVar[int | None] = 1
    error_factor: ClassVar[float] = 2.0  # the angle is rounded before its sine is taken
    by_name: ClassVar[bool] = False
    laws: ClassVar[Mapping[Law, float]] = {"copies": 2.0**-22, "copies_of_base": 2.0**-22}

    t: float
    flatten: bool = True

    def residency(self) -> Grain:
        """Return "row" where rows are vectors of their own."""
        return "element" if self.flatten else "row"

    def scans(self) -> Sequence[Scan]:
        """Return the angle between base and model, if tensors are whole vectors."""
        return [Scan("angle", Angle(), of=_pair)] if self.flatten else []

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the interpolated slab."""
        assert slab.base is not None  # needs_base
        other = slab.tensors[0]
        if not other.numel():
            return other
        if self.flatten:
            a, b = coefficients(scans["angle"], self.t)
            return other.mul_(b).add_(slab.base * a)
        rows, base = other.view(-1, slab.columns), slab.base.view(-1, slab.columns)
        factors = [coefficients(theta, self.t) for theta in ops.row_angles(base, rows)]
        ops.scale_rows(rows, [b for _, b in factors])
        rows.add_(ops.scale_rows(base.clone(), [a for a, _ in factors]))
        return other

    def scratch_bytes(self, models: int, elements: int) -> int:
        """Return the bytes of the rows in float64, where rows are vectors."""
        del models
        return 4 * elements if self.flatten else 112 * elements  # measured: 100


def _pair(slab: Slab, scans: Scans) -> list[Tensor]:
    del scans
    assert slab.base is not None  # needs_base
    return [slab.base, slab.tensors[0]]
