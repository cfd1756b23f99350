"""Fusion of the changes that matter most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from merge_kit.core.tensors import BLOCK
from merge_kit.methods.base import Grain, Law, MergeMethod, Scan, Scans, Slab
from merge_kit.methods.divergence import importance
from merge_kit.methods.lazy import torch
from merge_kit.methods.order import MagnitudeAt, Quantile
from merge_kit.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor

_QUARTERS = tuple((0, Quantile(q)) for q in (0.25, 0.5, 0.75))


@register("arcee_fusion")
@dataclass(frozen=True, kw_only=True)
class ArceeFusion(MergeMethod):
    """Take over from a fine-tune only its outstanding changes.

    out = x where s >= median(s) + 1.5 (Q3(s) - Q1(s)) over the tensor, else base, with the
    importance s = |x - base| KL(softmax(x) || softmax(base)), the divergence of the element's
    row (the last axis), 1e-8 added to each probability

    Q1, median and Q3 are the elements at index floor(q (n - 1)) of the n importances in ascending
    order, exact for tensors of any size. Importances are computed in float64 and never negative.
    Where they are all equal the threshold is at most each of them, and everything is taken over:
    so in 0-d tensors and rows of one element, whose softmax is 1 in both models.

    Scope: thresholds per tensor, divergences per row. Vote, normalisation: none.

    Differences: mergekit takes softmax and logarithms in the dtype of the tensors, in which the
    divergences of small changes are rounding noise of either sign; the same rows of small changes
    have other importances here. Above a million elements it takes quartiles of a random sample,
    another at each run.

    Cost: two passes, each with three exponentials or logarithms an element in float64.
    Source: arcee-ai, mergekit, Arcee Fusion,
        https://github.com/arcee-ai/mergekit
    """

    needs_base: ClassVar[bool] = True
    takes_base: ClassVar[bool] = True
    grain: ClassVar[Grain] = "row"
    max_inputs: ClassVar[int | None] = 1
    laws: ClassVar[Mapping[Law, float]] = {
        "copies": 0.0,
        "copies_of_base": 0.0,
        "permute_rows": 0.0,
    }

    def scans(self) -> Sequence[Scan]:
        """Return the quartiles of the importances."""
        return [Scan("quarters", MagnitudeAt(_QUARTERS), of=_importance)]

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the model where its importance reaches the threshold, else the base."""
        assert slab.base is not None  # needs_base
        other = slab.tensors[0]
        if not other.numel():
            return other
        first, median, third = (cut.threshold for cut in scans["quarters"])
        scores = importance(slab.base, other, slab.columns)
        taken = torch.empty_like(other)
        torch.ge(scores, median + 1.5 * (third - first), out=taken)
        other.mul_(taken)
        return other.add_(taken.neg_().add_(1).mul_(slab.base))

    def scratch_bytes(self, models: int, elements: int) -> int:
        """Return the bytes of importances and a mask, and of distributions if it is one row."""
        del models
        return 96 * elements + 32 * BLOCK


def _importance(slab: Slab, scans: Scans) -> list[Tensor]:
    del scans
    assert slab.base is not None  # needs_base
    return [importance(slab.base, slab.tensors[0], slab.columns)]
