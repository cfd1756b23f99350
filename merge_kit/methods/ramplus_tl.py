"""Merging of agents, with what each of them changed alone strengthened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, ClassVar, Literal

from merge_kit.errors import ParameterError
from merge_kit.methods.base import Law, MergeMethod, Scan, Scans, Slab
from merge_kit.methods.lazy import torch
from merge_kit.methods.overlap import Overlap, check_epsilon, keep_changes
from merge_kit.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register("ramplus_tl")
@dataclass(frozen=True, kw_only=True)
class RAMPlusTL(MergeMethod):
    """Average what several models changed and strengthen what one changed alone (RAM+).

    out = base + l_i d_i where only model i changed the element (|d_i| > epsilon, d_i = x_i - base),
    base + the mean of the d_i that changed it where several did, else base, with
    l_i = 1 + r * min(alpha, shared_i / unique_i), where model i changed unique_i elements alone and
    shared_i together with others

    Averaging weakens what a model shares; the more it shares, the more the rest is strengthened to
    make up for it, by r * alpha at most. r 0 is ram.

    Scope: unique_i and shared_i are counted per tensor, or over all tensors of the stage
    (scope: model). Vote: none. Normalisation: by the number of models that changed the element.

    Differences: mergekit counts per tensor ("tensor-local"), divides by max(unique_i, epsilon),
    which differs only if epsilon is above 1, and computes deltas in the dtype of the models; here
    they are float32, so that changes close to epsilon may fall on its other side. The authors' code
    counts over the whole model and does not cap below 1: scope: model, alpha 1, and r its
    rescale_factor minus 1 (0.2 in their example).

    Attributes:
        r: Strength of the rescaling, any finite number.
        alpha: Largest ratio of shared to unique changes that counts, at least 0.
        epsilon: Largest magnitude that is no change, at least 0.
        scope: "tensor", or "model": changes are counted over all tensors together.

    Cost: two passes.
    Source: Yuan et al. 2026, Behavior knowledge merge in reinforced agentic models,
        https://arxiv.org/abs/2601.13572
    """

    needs_base: ClassVar[bool] = True
    takes_base: ClassVar[bool] = True
    operates_on: ClassVar = "deltas"
    min_inputs: ClassVar[int] = 0
    error_factor: ClassVar[float] = 2.0  # the subtraction and the factor round too
    laws: ClassVar[Mapping[Law, float]] = {
        "copies": 0.0,
        "copies_of_base": 0.0,
        "permute_models": 2.0**-20,
        "permute_rows": 0.0,
    }

    r: float = 0.1
    alpha: float = 0.2
    epsilon: float = 1e-5
    scope: Literal["tensor", "model"] = "tensor"

    def __post_init__(self) -> None:
        check_epsilon(self.epsilon)
        if not isfinite(self.r):
            raise ParameterError("r", f"is {self.r:g}, expected a finite number")
        if not (self.alpha >= 0 and isfinite(self.alpha)):
            raise ParameterError("alpha", f"is {self.alpha:g}, expected a number of at least 0")

    def scans(self) -> Sequence[Scan]:
        """Return how many changes each model shares, and how many are its own."""
        return [Scan("overlap", Overlap(self.epsilon), scope=self.scope)]

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the base plus means of shared changes and rescaled changes of one model."""
        assert slab.base is not None  # needs_base
        if not slab.deltas.numel():
            return slab.base.clone()
        count = keep_changes(slab.deltas, self.epsilon)
        alone, factor = torch.empty_like(count), torch.empty_like(count)
        torch.eq(count, 1, out=alone)
        total = slab.deltas[0]
        for row, (shared, unique) in zip(slab.deltas, scans["overlap"], strict=True):
            ratio = shared / max(unique, 1)
            torch.mul(alone, self.r * min(ratio, self.alpha), out=factor)
            row.mul_(factor.add_(1))
        for row in slab.deltas[1:]:
            total.add_(row)
        return total.div_(count.clamp_min_(1)).add_(slab.base)

    def scratch_bytes(self, models: int, elements: int) -> int:
        """Return the bytes of the count, of two masks, and of a factor."""
        del models
        return 32 * elements
