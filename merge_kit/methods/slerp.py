"""Spherical interpolation of two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import atan2, sin, sqrt
from typing import TYPE_CHECKING, ClassVar

from merge_kit.methods import ops
from merge_kit.methods.base import Grain, Law, MergeMethod, Scan, Scans, Slab
from merge_kit.methods.lazy import torch
from merge_kit.methods.reductions import Gram
from merge_kit.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


def coefficients(aa: float, bb: float, ab: float, t: float) -> tuple[float, float]:
    """Return the factors of a and b, from their dot products.

    Zero vectors, and angles with sin(theta) <= 1e-6 (parallel or opposite), interpolate linearly.
    """
    if aa <= 0 or bb <= 0:
        return 1 - t, t
    cosine = ab / (sqrt(aa) * sqrt(bb))
    sine = sqrt(max(0.0, (1 - cosine) * (1 + cosine)))
    if sine <= 1e-6:
        return 1 - t, t
    theta = atan2(sine, cosine)
    return sin((1 - t) * theta) / sin(theta), sin(t * theta) / sin(theta)


@register("slerp")
@dataclass(frozen=True, kw_only=True)
class Slerp(MergeMethod):
    """Spherical linear interpolation between the base and one other model.

    out = sin((1-t) theta)/sin(theta) * base + sin(t theta)/sin(theta) * x,
    theta the angle between the two tensors

    The vectors keep their own lengths (they are not normalised). A zero vector, and parallel or
    opposite tensors (sin(theta) <= 1e-6), interpolate linearly; opposite ones pass through zero
    at t = 0.5. t outside [0, 1] extrapolates along the arc. 0-d tensors are vectors of length 1.
    mergekit already switches to linear interpolation at |cos(theta)| > 0.9995.

    More than two models: a sequence of stages, the k-th with t = w_k / (w_1 + ... + w_k); the
    result depends on the order.

    Attributes:
        t: 0 gives the base, 1 the other model; any finite number.
        flatten: Whether a tensor is one vector; false: each row (last axis) is a vector.

    Cost: two passes; one where rows are vectors.
    Source: Shoemake 1985, Animating rotation with quaternion curves,
        https://doi.org/10.1145/325334.325242
    """

    needs_base: ClassVar[bool] = True
    takes_base: ClassVar[bool] = True
    max_inputs: ClassVar[int | None] = 1
    error_factor: ClassVar[float] = 2.0  # the angle is rounded before its sine is taken
    laws: ClassVar[Mapping[Law, float]] = {"copies": 2.0**-22, "copies_of_base": 2.0**-22}

    t: float
    flatten: bool = True

    def residency(self) -> Grain:
        """Return "row" where rows are vectors of their own."""
        return "element" if self.flatten else "row"

    def scans(self) -> Sequence[Scan]:
        """Return the dot products of base and model, if tensors are whole vectors."""
        return [Scan("gram", Gram(), of=_pair)] if self.flatten else []

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the interpolated slab."""
        assert slab.base is not None  # needs_base
        other = slab.tensors[0]
        if self.flatten:
            gram = scans["gram"]
            a, b = coefficients(float(gram[0, 0]), float(gram[1, 1]), float(gram[0, 1]), self.t)
            return other.mul_(b).add_(slab.base, alpha=a)
        rows, base = other.view(-1, slab.columns), slab.base.view(-1, slab.columns)
        aa, bb, ab = ops.row_dots(base, base), ops.row_dots(rows, rows), ops.row_dots(base, rows)
        for i in range(rows.shape[0]):
            a, b = coefficients(float(aa[i]), float(bb[i]), float(ab[i]), self.t)
            rows[i].mul_(b).add_(base[i], alpha=a)
        return other


def _pair(slab: Slab, scans: Scans) -> Tensor:
    del scans
    assert slab.base is not None  # needs_base
    return torch.stack((slab.base, slab.tensors[0]))
