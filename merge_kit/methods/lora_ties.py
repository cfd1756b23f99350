"""TIES of the changes that adapters make, compressed to an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from merge_kit.methods.base import PerModel, per_model
from merge_kit.methods.dropping import check_densities
from merge_kit.methods.registry import register
from merge_kit.methods.ties import Ties
from merge_kit.methods.truncating import Compressing


@register("lora_ties")
@dataclass(frozen=True, kw_only=True)
class LoraTies(Compressing):
    """Merge the changes of adapters by TIES, element by element, and compress the result.

    d_i = s_i b_i a_i, D = lambda * TIES(w_i d_i), out = U_r S_r V_r^T with U S V^T = D

    The change of each module is formed, (outputs, inputs), and merged by `ties` with these
    parameters, as if the adapters had been merged into the base first: the same elements are
    trimmed, the same signs are elected. A matrix of signs has full rank, whatever the ranks of the
    changes: what the result misses of D is reported for each module. The factors have numbers of
    one size, and the scale 1. A module that some adapters lack is a change of zeros for them.

    Scope: each matrix. Vote: by the weighted sum. Normalisation: by the weights of those that
    agree; without it they are summed.

    Differences: peft's combination "ties_svd" does the same, but for the vote, which has no
    weights there, and the mean, which divides by the number of those that agree. Its "ties" merges
    the a and the b by themselves, which no change corresponds to.

    Attributes:
        saved: What becomes of tensors that adapters hold whole, where these differ: error, mean, or
            first, that of the first adapter that holds one.
        weight: Weight of each adapter, any finite number.
        density: Share of each change that is kept, in [0, 1].
        normalize: Whether to divide by the weights of those that agree.
        rescale: Whether to give each trimmed change its L1 norm back.
        lambda_: Factor on the merged change.
        elect: mass: the sign of the sum; count: the sign of more adapters.
        rank: Rank of each module of the result, at most the sides of the matrix. By default,
            without energy, the sum of the ranks of the adapters for this module.
        energy: Share of the sum of squared singular values that is kept of each module, in (0, 1],
            in place of rank.

    Cost: each change is formed twice, in float32, and its largest singular values are found in
        float64; with energy, all of them: minutes per billion parameters, as the plan says.
    Source: Yadav et al. 2023, TIES-Merging, https://arxiv.org/abs/2306.01708
    """

    weight: PerModel[float] = per_model(1.0)
    density: PerModel[float] = per_model(1.0)
    normalize: bool = True
    rescale: bool = False
    lambda_: float = 1.0
    elect: Literal["mass", "count"] = "mass"
    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_densities(self.density)

    def keeps_one(self, rank: int) -> bool:
        """Return whether nothing is trimmed, scaled or truncated."""
        whole = all(density == 1 for density in self.density)
        return whole and self.lambda_ == 1 and self.keeps(rank)

    def elementwise(self) -> Ties:
        """Return TIES with these parameters."""
        return Ties(
            weight=self.weight,
            density=self.density,
            normalize=self.normalize,
            rescale=self.rescale,
            lambda_=self.lambda_,
            elect=self.elect,
        )
