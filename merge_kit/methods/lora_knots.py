"""Adapters aligned by a decomposition of them all, then merged by TIES or DARE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from merge_kit.methods import aligned, consensus, dropping, factors
from merge_kit.methods.base import PerModel, Scans, Slab, Yield, per_model
from merge_kit.methods.lazy import torch
from merge_kit.methods.low_rank import Change
from merge_kit.methods.registry import register
from merge_kit.methods.truncating import Truncating
from merge_kit.methods.updates import Spectrum, Work

if TYPE_CHECKING:
    from torch import Tensor


@register("lora_knots")
@dataclass(frozen=True, kw_only=True)
class LoraKnots(Truncating):
    """Align adapters in the directions of their outputs, and merge them there (KnOTS).

    out = lambda * U M(w_i S V_i^T) with [d_1 ... d_n] = U S [V_1^T ... V_n^T], d_i = s_i b_i a_i

    The changes d_i (outputs, inputs) of a module are put side by side and decomposed once. Row j of
    every S V_i^T then says what adapter i does to the same output direction, column j of U, and the
    M of `merging` compares like with like: it trims each S V_i^T (dare_ties: drops elements at
    random), elects signs, and merges what agrees, as the methods of these names do. No change is
    formed: out has at most R directions, the sum of the ranks, and with no rank or energy it is
    kept whole. The factors have numbers of one size, and the scale 1. Adapters of weight 0, and
    those that lack a module, take no part in it. Singular values below 2^-24 of the length of all
    changes are rounding of float32. Of equal singular values the directions are a choice, and what
    is trimmed, dropped or voted on hangs on it; so does a vote of aligned changes that cancel.
    Which elements dare_ties keeps depends on the seed, the name of the module's a, and the position
    among the adapters that take part.

    Scope: each module by itself. Vote: by the weighted sum. Normalisation: by the weights of those
    that agree; without it they are summed.

    Differences: the paper merges the V_i^T, its code S V_i^T. That is the same to votes, means and
    random pruning; trimming by magnitude differs: of V_i^T, directions in which the adapters do
    next to nothing count as much as any other. `variant: paper` trims those. The code ranks
    magnitudes over the whole model, keeps one element more, drops what is below 1e-5, takes a scale
    of 1 for every adapter, and has no weights but one factor on the result (lambda here). It gives
    no adapter but a merged model.

    Attributes:
        saved: What becomes of tensors that adapters hold whole, where these differ: error, mean, or
            first, that of the first adapter that holds one.
        weight: Weight of each adapter, any finite number.
        density: Share of each aligned change that is kept, in [0, 1]: of the largest magnitude, or
            at random.
        merging: ties or dare_ties: how the aligned changes are merged.
        normalize: Whether to divide by the weights of those that agree.
        lambda_: Factor on the merged change.
        variant: code: S V_i^T are trimmed, as the authors' code does; paper: V_i^T are.
        rank: Rank of each module of the result, at most the sum of the ranks of the adapters for
            this module and the sides of the matrix, which is the default.
        energy: Share of the sum of squared singular values that is kept of each module, in (0, 1],
            in place of rank: each module has the smallest rank that keeps it.

    Cost: for a module, 4 (outputs + 2 inputs) R^2 operations in float64, R the sum of the ranks,
        and n matrices of (R, inputs); with energy, twice that.
    Source: Stoica et al. 2025, Model merging with SVD to tie the Knots,
        https://arxiv.org/abs/2410.19735
    """

    additive: ClassVar[bool] = False

    weight: PerModel[float] = per_model(1.0)
    density: PerModel[float] = per_model(1.0)
    merging: Literal["ties", "dare_ties"] = "ties"
    normalize: bool = True
    lambda_: float = 1.0
    variant: Literal["code", "paper"] = "code"
    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        dropping.check_densities(self.density)

    def keeps_one(self, rank: int) -> bool:
        """Return whether nothing is trimmed, scaled or truncated."""
        whole = all(density == 1 for density in self.density)
        return whole and self.lambda_ == 1 and self.keeps(rank)

    def fit(self, slab: Slab, scans: Scans) -> Sequence[Spectrum]:
        """Return the smallest ranks that keep the energy."""
        del scans
        if not factors.are_finite(slab):
            return factors.no_spectra(slab)
        return factors.fitted(self._changes(slab), slab.name, self.rank, self.energy)

    def merge(self, slab: Slab, scans: Scans) -> Yield:
        """Return the factors of what is merged in aligned directions."""
        del scans
        if not factors.are_finite(slab):
            return factors.not_finite(slab)
        return factors.truncated(self._changes(slab), slab)

    def _changes(self, slab: Slab) -> list[Change]:
        found = aligned.bases(factors.factors(slab))
        assert len(found.rights) == len(self.density)  # those of the changes
        return [self._merged(found, weights, slab) for weights in factors.uses(slab)]

    def _merged(self, found: aligned.Bases, weights: Sequence[float], slab: Slab) -> Change:
        noise = factors.noise(slab)
        chosen = [i for i, weight in enumerate(weights) if weight]
        if not chosen:
            return aligned.change_of(
                found.left[:, :0], found.left.new_zeros(0, slab.shape[1]), noise
            )
        parts = aligned.align(found, chosen, noise, slab.name)
        values, rows = parts.values.unsqueeze(1), torch.stack(parts.rows)
        if self.variant == "code":
            rows.mul_(values)
        merged = self._together(rows.flatten(1), chosen, [weights[i] for i in chosen], slab)
        merged = merged.view(rows.shape[1:])
        if self.variant == "paper":
            merged.mul_(values)
        return aligned.change_of(parts.left, merged, noise)

    def _together(
        self, rows: Tensor, chosen: Sequence[int], weights: Sequence[float], slab: Slab
    ) -> Tensor:
        """Return the merge of aligned changes, (elements,), without the values; overwrites them.

        Args:
            rows: (chosen, elements).
            chosen: Places of the changes among those of the module.
            weights: One a row, none of them 0.
        """
        name = slab.name.rpartition("/")[2]  # the same noise in whatever folder the adapter goes
        for place, (row, i) in enumerate(zip(rows, chosen, strict=True)):
            if self.merging == "ties":
                aligned.keep_largest(row, self.density[i])
            else:
                dropping.drop(row, self.density[i], (slab.seed, "knots", place, name), 0)
        base, share = rows.new_zeros(rows.shape[1]), self.normalize
        return consensus.voted(rows, weights, weights, base, self.lambda_, normalize=share)

    def work(self, shape: tuple[int, int], ranks: Sequence[int], made: Sequence[int]) -> Work:
        """Return what the decompositions take, and the aligned changes."""
        found, total = factors.work(shape, ranks, made), sum(ranks)
        matrices = 8 * (2 * len(ranks) + 4) * min(total, max(shape)) * shape[1]
        flops = found.flops + len(made) * 6.0 * total**2 * shape[1]
        return Work(found.scratch_bytes + matrices, flops)
