"""The sum of adapters, truncated to a rank or to a share of its energy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merge_kit.methods import factors
from merge_kit.methods.base import PerModel, Scans, Slab, Yield, per_model
from merge_kit.methods.registry import register
from merge_kit.methods.truncating import Truncating
from merge_kit.methods.updates import Spectrum, Work


@register("lora_svd")
@dataclass(frozen=True, kw_only=True)
class LoraSvd(Truncating):
    """Add adapters up, and keep the largest singular values of each module's change.

    out = B A with B = U_r sqrt(S_r), A = sqrt(S_r) V_r^T, U S V^T = sum(w_i s_i b_i a_i)

    Of all factors of this rank, these are the closest to the sum; what they miss is the root of
    the sum of the squared values that are left out, and is reported for each module. The change
    itself is never formed: with the QR decompositions [b_1 ... b_n] = Q_b [L_1 ... L_n] and
    [a_1; ...; a_n]^T = Q_a [K_1 ... K_n], U and V are Q_b and Q_a times the singular vectors of the
    R x R matrix sum(w_i s_i L_i K_i^T), R the sum of the ranks. B and A have numbers of one size,
    of which 16 bits lose least; the scale of the result is 1. Singular values below 2^-24 of the
    length of what is added are rounding of float32: they are left out, and zeros fill the rank.

    One adapter alone, with weight 1 and no larger rank than is asked for, stays as it is.

    Scope: each module by itself. Vote: none. Normalisation: none.

    Differences: peft's combination "svd" forms the change, leaves the singular values to b alone,
    and has no energy.

    Attributes:
        saved: What becomes of tensors that adapters hold whole, where these differ: error, mean, or
            first, that of the first adapter that holds one.
        weight: Weight of each adapter, any finite number.
        rank: Rank of each module of the result, at most the sum of the ranks and the sides of the
            matrix. By default, without energy, the largest rank of the adapters for this module.
        energy: Share of the sum of squared singular values that is kept of each module, in (0, 1],
            in place of rank: each module has the smallest rank that keeps it.

    Cost: for a module, 4 (outputs + inputs) R^2 operations in float64, R the sum of the ranks; with
        energy, twice that.
    Source: Hu et al. 2021, LoRA, https://arxiv.org/abs/2106.09685; Eckart and Young 1936, The
        approximation of one matrix by another of lower rank, https://doi.org/10.1007/BF02288367
    """

    weight: PerModel[float] = per_model(1.0)
    rank: int | None = None
    energy: float | None = None

    def default_rank(self, ranks: Sequence[int]) -> int:
        """Return the largest."""
        return max(ranks, default=0)

    def keeps_one(self, rank: int) -> bool:
        """Return whether the rank is no larger than what is asked for."""
        return self.keeps(rank)

    def fit(self, slab: Slab, scans: Scans) -> Sequence[Spectrum]:
        """Return the smallest ranks that keep the energy."""
        del scans
        if not factors.are_finite(slab):
            return factors.no_spectra(slab)
        return factors.fitted(factors.sums(slab), slab.name, self.rank, self.energy)

    def merge(self, slab: Slab, scans: Scans) -> Yield:
        """Return the factors of the truncated sums."""
        del scans
        if not factors.are_finite(slab):
            return factors.not_finite(slab)
        return factors.truncated(factors.sums(slab), slab)

    def work(self, shape: tuple[int, int], ranks: Sequence[int], made: Sequence[int]) -> Work:
        """Return what two QR decompositions and one of the core take."""
        return factors.work(shape, ranks, made)
