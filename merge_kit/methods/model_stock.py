"""An average of fine-tunes, drawn towards their base as far as they disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, ClassVar

from merge_kit.core.tensors import BLOCK
from merge_kit.methods import arcs, ops
from merge_kit.methods.base import Grain, Law, MergeMethod, Scan, Scans, Slab
from merge_kit.methods.lazy import torch
from merge_kit.methods.reductions import TINY_SQUARE, Gram
from merge_kit.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register("model_stock")
@dataclass(frozen=True, kw_only=True)
class ModelStock(MergeMethod):
    """Average fine-tunes and go back towards the base by the angle between their task vectors.

    out = base + t mean(d_i), t = N c / (1 + (N-1) c), d_i = x_i - base,
    c the mean cosine of all pairs of the N task vectors, a tensor at a time

    Task vectors that agree (c = 1) give the mean of the fine-tunes, those at right angles the
    base. c is the paper's cosine of two models; the mean over pairs is how mergekit extends it.
    A pair with a zero vector (of a length below 1e-150) has the cosine 0.

    A mean cosine below 0 counts as 0: the formula would go away from the fine-tunes, without
    bound as c approaches -1/(N-1). mergekit does so (but for the last 1e-6, which give the base).
    mergekit also takes the product of two lengths to be at least 1e-6, so that task vectors of
    small tensors seem to disagree; here the scale of the task vectors does not matter.

    Attributes:
        filter_wise: Whether each row (last axis) of a tensor has its own angle, tensors of one
            axis or none being one row; false: a tensor has one.

    Cost: two passes; one if filter_wise is true.
    Source: Jang et al. 2024, Model Stock: all we need is just a few fine-tuned models,
        https://arxiv.org/abs/2403.19522
    """

    needs_base: ClassVar[bool] = True
    takes_base: ClassVar[bool] = True
    operates_on: ClassVar = "deltas"
    min_inputs: ClassVar[int] = 2
    error_factor: ClassVar[float] = 2.0  # the subtraction rounds, and the factor does
    by_name: ClassVar[bool] = False
    laws: ClassVar[Mapping[Law, float]] = {
        "copies": 0.0,
        "copies_of_base": 0.0,
        "permute_models": 2.0**-20,
        "permute_rows": 2.0**-20,
    }

    filter_wise: bool = False

    def residency(self) -> Grain:
        """Return "row" where rows have their own angle."""
        return "row" if self.filter_wise else "element"

    def scans(self) -> Sequence[Scan]:
        """Return the dot products of the task vectors, if tensors are whole vectors."""
        return [] if self.filter_wise else [Scan("gram", Gram())]

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the base plus a share of the mean task vector; overwrites the models."""
        assert slab.base is not None  # needs_base
        rows = slab.deltas
        if not self.filter_wise:
            gram = scans["gram"]
            return _summed(rows, _ratio(gram.unsqueeze(-1))).add_(slab.base)
        if rows[0].numel():
            deltas = [row.view(-1, slab.columns) for row in rows]
            vectors, elements = deltas[0].shape
            for run in arcs.groups(vectors, elements, arcs.MOST_VECTORS // len(rows)):
                part = [delta[run] for delta in deltas]
                _summed(part, _ratio(_row_grams(part)).unsqueeze(1))
        return rows[0].add_(slab.base)

    def scratch_bytes(self, models: int, elements: int) -> int:
        """Return the bytes of the rows whose dot products are taken together."""
        if not self.filter_wise:
            return 4 * elements
        return 8 * (2 * BLOCK * (models + 1) + arcs.MOST_VECTORS * (models + 8))


def _summed(rows: Sequence[Tensor] | Tensor, ratio: Tensor) -> Tensor:
    """Return ratio * mean of the rows, in place of the first.

    Args:
        ratio: Float64, one number or one a vector.
    """
    total = rows[0]
    for row in rows[1:]:
        total.add_(row)
    return total.mul_((ratio / len(rows)).to(total.dtype))


def _row_grams(rows: Sequence[Tensor]) -> Tensor:
    """Return (models, models, vectors): the dot products of each vector of (vectors, elements)."""
    models, vectors = len(rows), len(rows[0])
    grams = torch.zeros(models, models, vectors, dtype=torch.float64)
    for pieces in zip(*(arcs.pieces(row) for row in rows), strict=True):
        for i, one in enumerate(pieces):
            for j in range(i, models):
                grams[i, j] += ops.folded(one * pieces[j])
    return grams


def _ratio(grams: Tensor) -> Tensor:
    """Return t of each vector, (vectors,), in [0, 1].

    Args:
        grams: (models, models, vectors), upper triangles.
    """
    models = len(grams)
    lengths = [grams[i, i].sqrt() for i in range(models)]
    inverse = [torch.where(x * x < TINY_SQUARE, 0.0, 1 / x) for x in lengths]
    total = torch.zeros_like(lengths[0])
    for i, j in combinations(range(models), 2):
        total += (grams[i, j] * inverse[i] * inverse[j]).clamp_(-1, 1)
    cosine = (total / (models * (models - 1) / 2)).nan_to_num_(0.0).clamp_(0, 1)
    return models * cosine / (1 + (models - 1) * cosine)
