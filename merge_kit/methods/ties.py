"""Trim, elect signs, merge what agrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import copysign
from typing import TYPE_CHECKING, ClassVar, Literal

from merge_kit.methods import consensus, trimming
from merge_kit.methods.base import Law, MergeMethod, PerModel, Scan, Scans, Slab, per_model
from merge_kit.methods.dropping import check_densities, fill
from merge_kit.methods.lazy import torch
from merge_kit.methods.reductions import Sum
from merge_kit.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register("ties")
@dataclass(frozen=True, kw_only=True)
class Ties(MergeMethod):
    """Trim task vectors, elect a sign for each element, and merge what agrees with it (TIES).

    t_i = the int(density_i n) elements of d_i = x_i - base of the largest magnitude, 0 elsewhere,
    s = sign(sum(w_i t_i)), A = the models whose w_i t_i has the sign s,
    out = base + lambda * sum over A of w_i t_i / sum over A of |w_i|

    The number kept is exact, at least 1 for a density above 0; of equal magnitudes the first
    elements are kept (over the whole model: the first tensors of the output, and their first
    elements). An element that nobody changed stays the base's.

    Scope: each tensor by itself, or the whole model. Vote: by the weighted sum, where 0 counts as
    plus; a negative weight turns its task vector around. Normalisation: by the weights of those
    that agree; without it they are summed.

    Differences: mergekit divides by the signed sum of the weights, so that a negative weight adds
    what it should remove, and weights that cancel blow up; here it is the sum of |w_i|. It keeps an
    arbitrary choice of equal magnitudes. peft votes without weights and divides by the number.
    variant paper is the authors' rule: magnitudes are ranked over the whole model, the vote is
    sign(sum(t_i)), without weights (but for their signs); where that is 0 the sign that more
    elements of the model elected, and minus if that is none; and the mean divides by the number of
    those that agree. The paper has no weights: with all weights 1 it is the paper's. Its code keeps
    int(density n) + 1 elements and everything that equals the last; here it is int(density n).

    Attributes:
        weight: Weight of each task vector, any finite number.
        density: Share of each task vector that is kept, in [0, 1].
        normalize: Whether to divide by the weights (paper: the number) of those that agree.
        rescale: Whether to give each trimmed task vector its L1 norm back, a tensor at a time.
        lambda_: Factor on the merged task vector.
        scope: What is ranked together: tensor, or model (the default of variant paper).
        elect: mass: the sign of the sum; count: the sign of more models, whatever their magnitude.
        disjoint: mean, sum, or max (the largest of those that agree); by default what normalize
            says, mean or sum.
        variant: mergekit or paper, as said above.

    Cost: two passes and a sample of the files; one more to rescale, and one with variant paper.
    Source: Yadav et al. 2023, TIES-Merging, https://arxiv.org/abs/2306.01708
    """

    needs_base: ClassVar[bool] = True
    takes_base: ClassVar[bool] = True
    operates_on: ClassVar = "deltas"
    min_inputs: ClassVar[int] = 0
    error_factor: ClassVar[float] = 4.0  # subtraction, divisor and division round too
    laws: ClassVar[Mapping[Law, float]] = {
        "single": 2.0**-22,
        "copies_of_base": 0.0,
        "permute_models": 2.0**-19,
        "permute_rows": 0.0,
    }

    weight: PerModel[float]
    density: PerModel[float] = per_model(1.0)
    normalize: bool = True
    rescale: bool = False
    lambda_: float = 1.0
    scope: Literal["tensor", "model"] | None = None
    elect: Literal["mass", "count"] = "mass"
    disjoint: Literal["mean", "sum", "max"] | None = None
    variant: Literal["mergekit", "paper"] = "mergekit"

    def __post_init__(self) -> None:
        fill(self, len(self.weight))
        check_densities(self.density)

    def scans(self) -> Sequence[Scan]:
        """Return the cuts, the L1 norms if they are restored, and the paper's majority."""
        scope = self.scope or ("model" if self.variant == "paper" else "tensor")
        cuts = trimming.cut_scan(self.density, scope)
        uses = tuple(scan.name for scan in cuts)
        lengths = [trimming.length_scan(self._trimmed, uses)] if self.rescale and cuts else []
        if self.variant != "paper" or not self.weight:
            return [*cuts, *lengths]
        # the elected signs of all tensors, where the whole model is ranked
        votes = Scan("majority", Sum(), of=self._elected, uses=uses, scope=scope)
        return [*cuts, *lengths, votes]

    def _trimmed(self, slab: Slab, scans: Scans) -> list[Tensor]:
        return trimming.trimmed(slab, self.density, scans)

    def _elected(self, slab: Slab, scans: Scans) -> list[Tensor]:
        return [torch.sign(self._votes(self._trimmed(slab, scans)))]

    def _votes(self, rows: Sequence[Tensor]) -> Tensor:
        """Return the paper's vote: the sum of task vectors, turned around by negative weights."""
        total = torch.zeros_like(rows[0])
        for row, weight in zip(rows, self.weight, strict=True):
            vote = torch.sign(row) if self.elect == "count" else row
            if weight:
                total.add_(vote, alpha=copysign(1, weight))
        return total

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the base plus the merged task vectors."""
        assert slab.base is not None  # needs_base
        rows = slab.deltas
        if not any(self.weight):
            return slab.base.clone()
        stretches = trimming.stretches(scans, len(rows))
        for start in range(0, rows.shape[1], consensus.PIECE):
            piece = [row[start : start + consensus.PIECE] for row in rows]
            trimming.trim(piece, self.density, scans, slab.name, slab.offset + start)
            base = slab.base[start : start + consensus.PIECE]
            self._merged(piece, stretches, base, scans)
        return rows[0]

    def _merged(
        self, rows: Sequence[Tensor], stretches: Sequence[float], base: Tensor, scans: Scans
    ) -> None:
        """Leave base plus merged task vectors in the first row."""
        paper = self.variant == "paper"
        sign = self._paper_signs(rows, scans) if paper else None
        for row, weight, stretch in zip(rows, self.weight, stretches, strict=True):
            if weight * stretch != 1.0:
                row.mul_(weight * stretch)
        if sign is None:
            sign = consensus.signs(rows, self.weight, self.elect)
        merge = self.disjoint or ("mean" if self.normalize else "sum")
        merged = consensus.disjoint(rows, self.weight, sign, merge, by_count=paper)
        if self.lambda_ != 1.0:
            merged.mul_(self.lambda_)
        merged.add_(base)

    def _paper_signs(self, rows: Sequence[Tensor], scans: Scans) -> Tensor:
        votes = self._votes(rows)
        majority = 1.0 if float(scans["majority"][0]) > 0 else -1.0
        signs = torch.sign(votes)
        nobody = torch.eq(signs, 0, out=votes)
        return signs.add_(nobody.mul_(majority))

    def scratch_bytes(self, models: int, elements: int) -> int:
        """Return the bytes of trimmed copies, where they are scanned, and of three short rows."""
        scanned = self.rescale or self.variant == "paper"
        return 24 * consensus.PIECE + (8 * (2 * models + 2) * elements if scanned else 0)
