"""A fine-tuned model as an adapter of its base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from merge_kit.errors import ParameterError
from merge_kit.methods import tiles
from merge_kit.methods.base import Scans, Slab, Yield
from merge_kit.methods.compression import compressed, spectrum, work
from merge_kit.methods.registry import register
from merge_kit.methods.updates import AdapterMethod, Spectrum, Work, check_truncation


@register("lora_extract")
@dataclass(frozen=True, kw_only=True)
class LoraExtract(AdapterMethod):
    """Turn a fine-tuned model into an adapter of its base: the low-rank part of what it changed.

    D = model - base, out = B A with B = U_r sqrt(S_r), A = sqrt(S_r) V_r^T, U S V^T = D

    U_r, S_r and V_r are the r largest singular values of a matrix with their vectors: of all
    adapters of this rank, the closest. Few values of a large matrix are found with a random start
    (the same in every run), and what they miss is at most 1.001 times what the closest misses, and
    1e-6 of the norm of D. It is reported for each matrix, with the rounding of A and B to their
    dtype. The scale of the result is 1. Matrices of linear layers and convolutions are factored;
    those that are not changed are left out. What has no low rank (norms, biases, embeddings, the
    head, rows of new tokens) and is changed goes the way that `rest` says.

    Scope: each matrix by itself. Vote: none. Normalisation: none.

    Differences: mergekit's extraction subtracts in the dtype of the models, decomposes each matrix
    whole, and stores norms and embeddings whether they are changed or not. It stores changed biases
    as biases of factors that its config does not announce, so that peft leaves them out.

    Attributes:
        rank: Rank of each matrix of the result, at most its sides.
        energy: Share of the sum of squared singular values that is kept of each matrix, in (0, 1],
            in place of rank: each matrix has the smallest rank that keeps it.
        rest: What becomes of what is changed and has no low rank. save: it is stored whole
            (modules_to_save, biases); refuse: it is an error; drop: it is left out, and said so.

    Cost: both models are read twice, one matrix at a time; about 25 operations for each weight and
        rank, and with energy a decomposition in float64: minutes per billion parameters, as the
        plan says.
    Source: Hu et al. 2021, LoRA, https://arxiv.org/abs/2106.09685; Halko et al. 2011, Finding
        structure with randomness, https://arxiv.org/abs/0909.4061; Musco and Musco 2015, Randomized
        block Krylov methods, https://arxiv.org/abs/1504.05477
    """

    works_on: ClassVar = "difference"
    needs_base: ClassVar[bool] = True
    takes_base: ClassVar[bool] = True
    operates_on: ClassVar = "deltas"
    max_inputs: ClassVar[int | None] = 1
    additive: ClassVar[bool] = False

    saved: ClassVar = "error"  # type: ignore[misc]  # there is one model: no parameter of it

    rank: int | None = None
    energy: float | None = None
    rest: Literal["save", "refuse", "drop"] = "save"

    def __post_init__(self) -> None:
        check_truncation(self.rank, self.energy)
        if self.rank is None and self.energy is None:
            hint = "add parameters: {rank: 16}, or {energy: 0.99}"
            raise ParameterError("rank", "and energy are both missing, expected one", hint=hint)

    def is_fitted(self) -> bool:
        """Return True: matrices that are not changed are left out."""
        return True

    def rank_bound(self, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        """Return the rank that is asked for, where there are so many directions."""
        del ranks
        return min(shape) if self.rank is None else min(self.rank, *shape)

    def fit(self, slab: Slab, scans: Scans) -> Sequence[Spectrum]:
        """Return the rank that is asked for, or the smallest that keeps the energy; 0 of zeros."""
        del scans
        if self.energy is not None:
            return [spectrum(slab, self.energy)]
        rows, columns = slab.shape
        norm = tiles.norm(slab.deltas[0].view(rows, columns))
        return [Spectrum(self.rank_bound((), (rows, columns)) if norm else 0, norm)]

    def merge(self, slab: Slab, scans: Scans) -> Yield:
        """Return the factors of the change."""
        del scans
        return compressed(slab)

    def work(self, shape: tuple[int, int], ranks: Sequence[int], made: Sequence[int]) -> Work:
        """Return what a decomposition of the change takes."""
        del ranks
        return work(shape, made, whole=self.energy is not None)
