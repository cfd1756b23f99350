"""DARE of the changes that adapters make, compressed to an adapter."""

from __future__ import annotations

from dataclasses import dataclass

from merge_kit.methods.base import PerModel, per_model
from merge_kit.methods.dare_linear import DareLinear
from merge_kit.methods.dare_ties import DareTies
from merge_kit.methods.registry import register
from merge_kit.methods.truncating import Compressing


@register("lora_dare")
@dataclass(frozen=True, kw_only=True)
class LoraDare(Compressing):
    """Drop elements of the changes of adapters at random, add up, and compress (DARE).

    d_i = s_i b_i a_i, D = lambda * DARE(w_i d_i), out = U_r S_r V_r^T with U S V^T = D

    The change of each module is formed, (outputs, inputs), and merged by `dare_linear`, or with
    ties by `dare_ties`, with these parameters, as if the adapters had been merged into the base
    first. The same elements are kept, by the seed and the name of the tensor, where the adapters
    name it (and lay it, fan_in_fan_out) as the base does; other names draw other elements. What is
    kept at random has full rank, whatever the ranks of the changes: what the result misses of D is
    reported for each module. The factors have numbers of one size, and the scale 1. A module that
    some adapters lack is a change of zeros for them.

    Scope: each element by itself. Vote: none, or with ties by weight and size. Normalisation: by
    the sum of the weights, with ties of those that agree; off.

    Differences: peft's combination "dare_linear_svd" does the same with noise of torch's generator;
    its "dare_ties_svd" votes without weights, and divides by the number of those that agree. Its
    "dare_linear" and "dare_ties" prune the a and the b by themselves, and add these up.

    Attributes:
        saved: What becomes of tensors that adapters hold whole, where these differ: error, mean, or
            first, that of the first adapter that holds one.
        weight: Weight of each adapter, any finite number.
        density: Probability of keeping an element, in [0, 1].
        normalize: Whether to divide by the weights.
        rescale: Whether to divide what is kept by the probability of keeping it.
        lambda_: Factor on the merged change.
        ties: Whether to elect signs, and merge what agrees.
        rank: Rank of each module of the result, at most the sides of the matrix. By default,
            without energy, the sum of the ranks of the adapters for this module.
        energy: Share of the sum of squared singular values that is kept of each module, in (0, 1],
            in place of rank.

    Cost: each change is formed and merged in float32, and its largest singular values are found in
        float64; with energy, all of them: minutes per billion parameters, as the plan says.
    Source: Yu et al. 2024, Language models are super Mario,
        https://arxiv.org/abs/2311.03099
    """

    weight: PerModel[float] = per_model(1.0)
    density: PerModel[float] = per_model(1.0)
    normalize: bool = False
    rescale: bool = True
    lambda_: float = 1.0
    ties: bool = False
    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.elementwise()  # it checks the densities, and the weights that normalising divides by

    def keeps_one(self, rank: int) -> bool:
        """Return whether nothing is dropped, scaled or truncated."""
        whole = all(density == 1 for density in self.density)
        alone = self.ties or not self.normalize or len(self.weight) == 1
        return whole and alone and self.lambda_ == 1 and self.keeps(rank)

    def elementwise(self) -> DareLinear | DareTies:
        """Return DARE with these parameters."""
        kind = DareTies if self.ties else DareLinear
        return kind(
            weight=self.weight,
            density=self.density,
            normalize=self.normalize,
            rescale=self.rescale,
            lambda_=self.lambda_,
        )
