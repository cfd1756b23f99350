"""Pruning of task vectors at random by rank, then their weighted sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from merge_kit.methods import dropping, ops, rank_dropping
from merge_kit.methods.base import Grain, Law, MergeMethod, PerModel, Scans, Slab, per_model
from merge_kit.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register("della_linear")
@dataclass(frozen=True, kw_only=True)
class DellaLinear(MergeMethod):
    """Drop small elements of task vectors more often than large ones, rescale, and add up.

    out = base + lambda * sum(w_i m_i d_i / q_i), over sum(w_i) if normalize is true
    d_i = x_i - base; m_i = 1 with probability q_i, else 0
    q = density - epsilon + 2 epsilon r / (c - 1)

    Each element is drawn by itself, and r is the rank of its magnitude in its row of c elements
    (the last axis; a 1-d tensor is one row, and a row of one element has the probability density):
    0 for the smallest, c - 1 for the largest, and of equal magnitudes the first has the lower rank.
    q is rounded to multiples of 2^-16 (2^-32 if one is within 2^-8 of 0 or 1), and what is kept is
    divided by exactly that: the expected value of each element is that of the task vector. Draws
    depend on the run's seed, the position of the model among the models (the base not counted), the
    name of the tensor, the row, and the rank. Density 0 keeps nothing, 1 everything.
    della keeps the same elements.

    Scope: each row by itself. Vote: none. Normalisation: the sum of the weights, off.
    Weights that are all zero give the base; others that cancel (a sum within 1e-6 of the sum of
    their magnitudes) cannot be normalised and are an error.

    Differences: mergekit does not divide by q but by the share of the tensor's L1 norm that
    happened to stay, which is biased. `variant: paper` differs in epsilon only, which is the whole
    window, in steps of epsilon / c: there q = density + epsilon / 2 - epsilon (c - 1 - r) / c.

    Attributes:
        weight: Weight of each task vector, any finite number.
        density: About the mean probability of keeping an element, in [0, 1].
        epsilon: Half of the window of probabilities, at least 0; density - epsilon and density +
            epsilon lie above 0 and below 1, unless density is 0 or 1.
        normalize: Whether to divide by the sum of the weights.
        rescale: Whether to divide what is kept by the probability of keeping it.
        lambda_: Factor on the sum.
        variant: "mergekit", or "paper": epsilon is the whole window.

    Cost: one pass; sorting rows and drawing take about four times as long as all the rest.
    Source: Deep et al. 2024, DELLA-Merging, https://arxiv.org/abs/2406.11617
    """

    needs_base: ClassVar[bool] = True
    takes_base: ClassVar[bool] = True
    operates_on: ClassVar = "deltas"
    grain: ClassVar[Grain] = "row"
    min_inputs: ClassVar[int] = 0
    error_factor: ClassVar[float] = 3.0  # the subtraction and 1/q round too
    laws: ClassVar[Mapping[Law, float]] = {"single": 2.0**-23, "copies_of_base": 0.0}

    weight: PerModel[float]
    density: PerModel[float] = per_model(1.0)
    epsilon: PerModel[float] = per_model(0.15)
    normalize: bool = False
    rescale: bool = True
    lambda_: float = 1.0
    variant: Literal["mergekit", "paper"] = "mergekit"

    def __post_init__(self) -> None:
        dropping.fill(self, len(self.weight))
        rank_dropping.check_windows(self.density, self.epsilon, self.variant)
        if self.normalize and any(self.weight):
            ops.total_weight(self.weight)

    def residency(self) -> Grain:
        """Return "element" where nothing is left to chance."""
        return rank_dropping.residency(self.density)

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the base plus what is kept of the weighted deltas."""
        del scans
        assert slab.base is not None  # needs_base
        if not any(self.weight):
            return slab.base.clone()
        factor = self.lambda_ / (ops.total_weight(self.weight) if self.normalize else 1.0)
        rank_dropping.drop_slab(
            slab, self.density, self.epsilon, self.variant, rescale=self.rescale
        )
        return ops.weighted_sum(slab.deltas, [w * factor for w in self.weight], slab.base)

    def scratch_bytes(self, models: int, elements: int) -> int:
        """Return the bytes of the ranks and draws of one model."""
        del models
        return rank_dropping.scratch_bytes(elements)
