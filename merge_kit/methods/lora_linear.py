"""The sum or mean of adapters, at the smallest rank that holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import copysign, sqrt
from typing import TYPE_CHECKING, Literal

from merge_kit.errors import ParameterError
from merge_kit.methods import factors, ops
from merge_kit.methods.base import PerModel, Scans, Slab, Yield, per_model
from merge_kit.methods.dropping import fill
from merge_kit.methods.low_rank import spanned
from merge_kit.methods.registry import register
from merge_kit.methods.updates import AdapterMethod, Spectrum, Work

if TYPE_CHECKING:
    from torch import Tensor


@register("lora_linear")
@dataclass(frozen=True, kw_only=True)
class LoraLinear(AdapterMethod):
    """Add adapters up, or average them, at the smallest rank that holds the result.

    out = sum(w_i s_i b_i a_i), over sum(w_i) if normalize is true

    The sum is exact and has no cross terms b_i a_j: its factors are those of lora_svd with as many
    singular values as are more than rounding. These are the ones above 2^-24 of the root of
    sum(|w_i s_i b_i a_i|^2), the length of what is added (2^-46 where the result is float64). So
    adapters that share their a, as those that were trained from one frozen a, come out at the rank
    of one of them; adapters that have nothing in common at the sum of the ranks, as in lora_concat;
    and what cancels leaves nothing behind. The plan shows the sum of the ranks as an upper bound.
    One adapter alone, with weight 1, stays as it is.

    The mean is over all adapters, those too that leave a module alone.

    Scope: each module by itself. Vote: none. Normalisation: by the sum of the weights, off.
    Weights that cancel (a sum within 1e-6 of the sum of their magnitudes) cannot be normalised and
    are an error.

    Differences: peft's combination "linear" adds factors instead of changes: a = sum(sign(c_i)
    sqrt(|c_i|) a_i) and b = sum(sqrt(|c_i|) b_i), with c_i = w_i s_i. Their product has all cross
    terms b_i a_j, which nobody trained; they are often longer than the sum itself.
    `variant: peft` does that, for adapters of equal rank.

    Attributes:
        saved: What becomes of tensors that adapters hold whole, where these differ: error, mean, or
            first, that of the first adapter that holds one.
        weight: Weight of each adapter, any finite number.
        normalize: Whether to divide by the sum of the weights.
        variant: exact, or peft: the products of sums of factors, cross terms included.

    Cost: for a module, 4 (outputs + inputs) R^2 operations in float64, R the sum of the ranks,
        twice: once for the rank.
    Source: Hu et al. 2021, LoRA, https://arxiv.org/abs/2106.09685; Huang et al. 2023, LoraHub (the
        sum of factors), https://arxiv.org/abs/2307.13269
    """

    weight: PerModel[float] = per_model(1.0)
    normalize: bool = False
    variant: Literal["exact", "peft"] = "exact"

    def __post_init__(self) -> None:
        fill(self, len(self.weight))
        if self.normalize and any(self.weight):
            ops.total_weight(self.weight)

    def coefficients(self, weights: Sequence[float]) -> tuple[float, ...]:
        """Return the weights, over their sum if that is asked for."""
        total = ops.total_weight(weights) if self.normalize and any(weights) else 1.0
        return tuple(weight / total for weight in weights)

    def splits_scales(self) -> bool:
        """Return whether cross terms depend on how factors are scaled."""
        return self.variant == "peft"

    def keeps_one(self, rank: int) -> bool:
        """Return True: one adapter is as it is."""
        del rank
        return True

    def rank_bound(self, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        """Return the sum of the ranks, where there are so many directions; or their one rank.

        Raises:
            ParameterError: If factors are added, and the ranks differ.
        """
        if self.variant == "exact":
            return min(sum(ranks), *shape)
        if len(set(ranks)) > 1:
            found = ", ".join(map(str, ranks))
            problem = f"is peft, and the ranks of the adapters are {found}, expected one rank"
            raise ParameterError("variant", problem, hint="use variant: exact")
        return ranks[0] if ranks else 0

    def is_fitted(self) -> bool:
        """Return whether the rank is the smallest that holds the sum."""
        return self.variant == "exact"

    def fit(self, slab: Slab, scans: Scans) -> Sequence[Spectrum]:
        """Return the ranks of the sums."""
        del scans
        if not factors.are_finite(slab):
            return factors.no_spectra(slab)
        return factors.fitted(factors.sums(slab), slab.name, None, None)

    def merge(self, slab: Slab, scans: Scans) -> Yield:
        """Return the factors of the sums."""
        del scans
        if not factors.are_finite(slab):
            return factors.not_finite(slab)
        if self.variant == "exact":
            return factors.truncated(factors.sums(slab), slab)
        pairs, tensors, facts = factors.factors(slab), [], []
        for coefficients in factors.uses(slab):
            a, b = _added(pairs, coefficients)
            made = spanned([(a, b)]).sum([1.0], factors.noise(slab))
            facts.append(factors.measured(made, a, b, slab.stored_dtype))
            tensors += [a, b]
        return Yield(tensors, facts)

    def work(self, shape: tuple[int, int], ranks: Sequence[int], made: Sequence[int]) -> Work:
        """Return what two QR decompositions and one of the core take."""
        return factors.work(shape, ranks if self.variant == "exact" else ranks[:1], made)


def _added(
    pairs: Sequence[tuple[Tensor, Tensor]], coefficients: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return the sums of a and of b, each factor with the root of its coefficient."""
    roots = [sqrt(abs(coefficient)) for coefficient in coefficients]
    a, b = pairs[0][0] * copysign(roots[0], coefficients[0]), pairs[0][1] * roots[0]
    for pair, root, coefficient in zip(pairs[1:], roots[1:], coefficients[1:], strict=True):
        a.add_(pair[0] * copysign(root, coefficient))
        b.add_(pair[1] * root)
    return a, b
