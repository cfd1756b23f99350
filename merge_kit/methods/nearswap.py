"""A step of limited size towards another model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, ClassVar

from merge_kit.errors import ParameterError
from merge_kit.methods.base import Law, MergeMethod, Scans, Slab
from merge_kit.methods.lazy import torch
from merge_kit.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register("nearswap")
@dataclass(frozen=True, kw_only=True)
class NearSwap(MergeMethod):
    """Move each element of the base towards another model, by t at most.

    out = base + sign(x - base) min(|x - base|, t)

    Elements that are close to one another (t or less apart) become those of the other model, the
    others hardly move; t has the unit of a weight. t = 0 gives the base. mergekit counts elements
    that are closer than 1e-6 as 1e-6 apart, so that a t below 1e-6 moves them by too little.

    Attributes:
        t: Farthest that an element moves, from 0.

    Cost: one pass.
    Source: alchemonaut 2024, QuartetAnemoi-70B,
        https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001
    """

    needs_base: ClassVar[bool] = True
    takes_base: ClassVar[bool] = True
    operates_on: ClassVar = "deltas"
    max_inputs: ClassVar[int | None] = 1
    checks_inputs: ClassVar[bool] = True  # an infinite difference is cut to t
    error_factor: ClassVar[float] = 2.0  # the subtraction rounds too
    by_name: ClassVar[bool] = False
    laws: ClassVar[Mapping[Law, float]] = {
        "copies": 0.0,
        "copies_of_base": 0.0,
        "permute_rows": 0.0,
    }

    t: float

    def __post_init__(self) -> None:
        if not (self.t >= 0 and isfinite(self.t)):
            hint = "t is how far an element may move, not a share"
            raise ParameterError("t", f"is {self.t:g}, expected a number from 0", hint=hint)

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the base, moved; overwrites the model."""
        del scans
        assert slab.base is not None  # needs_base
        step = slab.deltas[0]
        farthest = min(self.t, torch.finfo(step.dtype).max)
        return step.clamp_(-farthest, farthest).add_(slab.base)
