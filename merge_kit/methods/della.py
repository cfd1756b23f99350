"""Pruning of task vectors at random by rank, then a vote on signs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from merge_kit.methods import dropping, rank_dropping
from merge_kit.methods.base import Grain, Law, MergeMethod, PerModel, Scans, Slab, per_model
from merge_kit.methods.registry import register
from merge_kit.methods.ties import Ties

if TYPE_CHECKING:
    from torch import Tensor


@register("della")
@dataclass(frozen=True, kw_only=True)
class Della(MergeMethod):
    """Drop small elements of task vectors more often than large ones, rescale, and vote on signs.

    e_i = m_i (x_i - base) / q_i; m_i = 1 with probability q_i, else 0
    q = density - epsilon + 2 epsilon r / (c - 1)
    s = sign(sum(w_i e_i)); A = the models whose w_i e_i has the sign s
    out = base + lambda * sum over A of w_i e_i,
          divided by sum over A of |w_i| if normalize is true

    Each element is drawn by itself, and r is the rank of its magnitude in its row of c elements
    (the last axis; a 1-d tensor is one row, and a row of one element has the probability density):
    0 for the smallest, c - 1 for the largest, and of equal magnitudes the first has the lower rank.
    q is rounded to multiples of 2^-16 (2^-32 if one is within 2^-8 of 0 or 1), and what is kept is
    divided by exactly that: the expected value of each element is that of the task vector. Draws
    depend on the run's seed, the position of the model among the models (the base not counted), the
    name of the tensor, the row, and the rank. Density 0 keeps nothing, 1 everything.
    della_linear keeps the same elements. A sum of zero counts as plus; an element that nobody keeps
    stays the base's.

    Scope: each row by itself. Vote: by weight and size. Normalisation: by the weights of the models
    that agree, element by element, on.

    Differences: mergekit does not divide by q but by the share of the tensor's L1 norm that
    happened to stay, which is biased, and normalises by the sum of w_i, not of |w_i|, so that a
    task vector of negative weight is added where it alone has a say. `variant: paper` differs in
    epsilon only, which is the whole window, in steps of epsilon / c: there
    q = density + epsilon / 2 - epsilon (c - 1 - r) / c. (The paper has no weights; with equal ones
    vote and mean are as there.)

    Attributes:
        weight: Weight of each task vector, any finite number.
        density: About the mean probability of keeping an element, in [0, 1].
        epsilon: Half of the window of probabilities, at least 0; density - epsilon and density +
            epsilon lie above 0 and below 1, unless density is 0 or 1.
        normalize: Whether to divide by the sum of the weights that agree.
        rescale: Whether to divide what is kept by the probability of keeping it.
        lambda_: Factor on the merged task vector.
        variant: "mergekit", or "paper": epsilon is the whole window.

    Cost: one pass; sorting rows and drawing take about four times as long as all the rest.
    Source: Deep et al. 2024, DELLA-Merging, https://arxiv.org/abs/2406.11617
    """

    needs_base: ClassVar[bool] = True
    takes_base: ClassVar[bool] = True
    operates_on: ClassVar = "deltas"
    grain: ClassVar[Grain] = "row"
    min_inputs: ClassVar[int] = 0
    error_factor: ClassVar[float] = 4.0  # the subtraction, 1/q, divisor and quotient round too
    laws: ClassVar[Mapping[Law, float]] = {"single": 2.0**-22, "copies_of_base": 0.0}

    weight: PerModel[float]
    density: PerModel[float] = per_model(1.0)
    epsilon: PerModel[float] = per_model(0.15)
    normalize: bool = True
    rescale: bool = True
    lambda_: float = 1.0
    variant: Literal["mergekit", "paper"] = "mergekit"

    def __post_init__(self) -> None:
        dropping.fill(self, len(self.weight))
        rank_dropping.check_windows(self.density, self.epsilon, self.variant)

    def residency(self) -> Grain:
        """Return "element" where nothing is left to chance."""
        return rank_dropping.residency(self.density)

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the base plus what agrees of what is kept."""
        del scans
        assert slab.base is not None  # needs_base
        if not any(self.weight):
            return slab.base.clone()
        rank_dropping.drop_slab(
            slab, self.density, self.epsilon, self.variant, rescale=self.rescale
        )
        vote = Ties(weight=self.weight, normalize=self.normalize, lambda_=self.lambda_)
        return vote.merge(slab, {})

    def scratch_bytes(self, models: int, elements: int) -> int:
        """Return the bytes of the ranks and draws of one model, and of the vote."""
        vote = Ties(weight=self.weight).scratch_bytes(models, elements)
        return rank_dropping.scratch_bytes(elements) + vote
