"""Random pruning of task vectors, then their weighted sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from merge_kit.methods import dropping, ops
from merge_kit.methods.base import Law, MergeMethod, PerModel, Scans, Slab, per_model
from merge_kit.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register("dare_linear")
@dataclass(frozen=True, kw_only=True)
class DareLinear(MergeMethod):
    """Drop elements of task vectors at random, rescale the others, and add up (DARE).

    out = base + lambda * sum(w_i m_i d_i / p_i), over sum(w_i) if normalize is true
    d_i = x_i - base; m_i = 1 with probability p_i, else 0

    Each element is drawn by itself. p_i is `density` rounded to a multiple of 2^-16 (2^-32 within
    2^-8 of 0 or 1), and what is kept is divided by exactly that: the expected value of each element
    is that of the whole task vector. Which elements are kept depends on the run's seed, the
    position of the model among the models (the base not counted), the name of the tensor, and the
    element. Density 0 keeps nothing, 1 everything. dare_ties keeps the same elements.

    Scope: each element by itself. Vote: none. Normalisation: the sum of the weights, off.
    Weights that are all zero give the base; others that cancel (a sum within 1e-6 of the sum of
    their magnitudes) cannot be normalised and are an error.

    Differences: mergekit divides by the share of the tensor's L1 norm that happened to stay, which
    is biased: of [1, 10, 100, 1000] at density 0.5 it gives [74, 146, 296, 526] on average. It
    does not normalise weights that cancel. The paper rescales as here.

    Attributes:
        weight: Weight of each task vector, any finite number.
        density: Probability of keeping an element, in [0, 1].
        normalize: Whether to divide by the sum of the weights.
        rescale: Whether to divide what is kept by the probability of keeping it.
        lambda_: Factor on the sum.

    Cost: one pass; drawing takes about as long as all the rest.
    Source: Yu et al. 2024, Language models are super Mario,
        https://arxiv.org/abs/2311.03099
    """

    needs_base: ClassVar[bool] = True
    takes_base: ClassVar[bool] = True
    operates_on: ClassVar = "deltas"
    min_inputs: ClassVar[int] = 0
    error_factor: ClassVar[float] = 3.0  # the subtraction and 1/p round too
    laws: ClassVar[Mapping[Law, float]] = {"single": 2.0**-23, "copies_of_base": 0.0}

    weight: PerModel[float]
    density: PerModel[float] = per_model(1.0)
    normalize: bool = False
    rescale: bool = True
    lambda_: float = 1.0

    def __post_init__(self) -> None:
        dropping.fill(self, len(self.weight))
        dropping.check_densities(self.density)
        if self.normalize and any(self.weight):
            ops.total_weight(self.weight)

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the base plus what is kept of the weighted deltas."""
        del scans
        assert slab.base is not None  # needs_base
        if not any(self.weight):
            return slab.base.clone()
        factor = self.lambda_ / (ops.total_weight(self.weight) if self.normalize else 1.0)
        dropping.drop_all(slab, self.density, rescale=self.rescale)
        return ops.weighted_sum(slab.deltas, [w * factor for w in self.weight], slab.base)
