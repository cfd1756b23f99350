"""Selection by variance, weights by energy, signs by majority."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import frexp
from typing import TYPE_CHECKING, ClassVar

from merge_kit.core.tensors import BLOCK
from merge_kit.errors import ParameterError
from merge_kit.methods.base import Law, MergeMethod, Scan, Scans, Slab
from merge_kit.methods.lazy import torch
from merge_kit.methods.order import MagnitudeAt, Top
from merge_kit.methods.registry import register
from merge_kit.methods.variance import Squares, chosen, spread

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_WEIGHT = 1e-18  # of the largest: changes no sum, and products with it stay normal floats
_LEAST_MASS = 1e-30


@register("sce")
@dataclass(frozen=True, kw_only=True)
class SCE(MergeMethod):
    """Select where fine-tunes differ most, weigh them by what they changed there, erase conflicts.

    out = base + sum(w_i m_i d_i) / sum(w_i m_i), element by element, with d_i = x_i - base where
    the element is selected and 0 where it is not, w_i = sum(d_i^2) / sum_j(sum(d_j^2)) over the
    tensor, and m_i = 1 where d_i is not zero and has the sign of sum_j(d_j), else 0

    Selected are the int(select_topk * v) elements of largest variance over the models, v the
    number of elements whose variance is not zero; of equal variances the first. select_topk 1
    selects all, also those in which the models agree. An element that is not selected is the
    base's: all of them in a tensor of which int() leaves none. Deltas that are all zero give the
    base. One model has no variance and nothing to select from: unless select_topk is 0 the result
    is that model.

    Scope: a tensor. Vote: by the sum of the selected deltas, unweighted; a sum of zero counts as
    positive. Normalisation: by the weights of the models that agree, element by element.

    Differences: mergekit weighs models equally if their mean squares sum to less than 1e-6, so
    that small task vectors lose the method, and divides by at least 1e-6, so that an element that
    only a light model changed comes out too small; with select_topk below 1 it gives the base for
    one model; its variances are in the dtype of the tensors, 16 bits of which make many equal, and
    which of those it selects is left to chance. The authors' code weighs by selected deltas but
    merges all of them; their paper merges the selected ones, as here.

    Attributes:
        select_topk: Share of the elements that differ between models that is selected, in [0, 1].

    Cost: three passes; two if select_topk is 1.
    Source: Wan et al. 2024, FuseChat: Knowledge fusion of chat models,
        https://arxiv.org/abs/2408.07990
    """

    needs_base: ClassVar[bool] = True
    takes_base: ClassVar[bool] = True
    operates_on: ClassVar = "deltas"
    min_inputs: ClassVar[int] = 0
    error_factor: ClassVar[float] = 2.0  # weights, products, both sums and the quotient round
    laws: ClassVar[Mapping[Law, float]] = {
        "single": 2.0**-23,
        "copies": 0.0,
        "copies_of_base": 0.0,
        "permute_models": 2.0**-20,
        "permute_rows": 2.0**-21,
    }

    select_topk: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.select_topk <= 1:
            raise ParameterError(
                "select_topk",
                f"is {self.select_topk:g}, expected a number in [0, 1]",
                hint="select_topk is the share that is selected, not a percentage",
            )

    def scans(self) -> Sequence[Scan]:
        """Return where the selection ends, and the energy of what each model has in it."""
        if self.select_topk == 0:
            return []
        if self.select_topk == 1:
            return [Scan("energies", Squares())]
        top = Top((self.select_topk,), of_nonzero=True)
        return [
            Scan("cut", MagnitudeAt(((0, top),)), of=_spread),
            Scan("energies", Squares(masked=True), of=_selected, uses=("cut",)),
        ]

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the base plus the weighted mean of the selected deltas that agree."""
        assert slab.base is not None  # needs_base
        if not len(slab.deltas) or self.select_topk == 0:
            return slab.base.clone()
        if len(slab.deltas) == 1:
            return slab.deltas[0].add_(slab.base)
        if self.select_topk < 1:
            slab.deltas.mul_(chosen(slab, scans["cut"][0]))
        most = max(scans["energies"])
        if most == 0:
            return slab.base.clone()
        unit = _unit(most)
        shares = [_share(one, most) * unit for one in scans["energies"]]
        return _agreeing(slab.deltas, shares).add_(slab.base)

    def scratch_bytes(self, models: int, elements: int) -> int:
        """Return the bytes of a sign, a sum and a mask, of variances and what they are made of."""
        del models
        return (24 if self.select_topk == 1 else 48) * elements + 32 * BLOCK


def _share(energy: float, most: float) -> float:
    """Return the weight of a model, that of the largest energy being 1."""
    if energy == most:
        return 1.0  # of float64 it may be infinite
    return max(energy / most, _LEAST_WEIGHT) if energy else 0.0


def _unit(most: float) -> float:
    """Return the weight of the largest energy, from 1: products with small deltas stay normal.

    The deltas of that model times it are at most 1; the others' are smaller still.
    """
    return 2.0 ** min(60, max(0, -frexp(most)[1] // 2))


def _agreeing(rows: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the weighted mean of the rows that have the sign of their sum; overwrites the rows.

    Args:
        rows: (models, elements).
        weights: One a model, 0 only for rows of zeros; the largest is 1 or more.
    """
    sign = rows[0].clone()
    for row in rows[1:]:
        sign.add_(row)
    torch.ge(sign, 0, out=sign).mul_(2).sub_(1)
    mass, voting = torch.zeros_like(sign), torch.empty_like(sign)
    for row, weight in zip(rows, weights, strict=True):
        row.mul_(sign).clamp_min_(0)
        mass.add_(torch.gt(row, 0, out=voting).mul_(weight))
        row.mul_(weight)
    total = rows[0]
    for row in rows[1:]:
        total.add_(row)
    return total.div_(mass.clamp_min_(_LEAST_MASS)).mul_(sign)


def _spread(slab: Slab, scans: Scans) -> list[Tensor]:
    del scans
    assert slab.base is not None  # needs_base
    return [spread(slab.deltas) if len(slab.deltas) else torch.zeros_like(slab.base)]


def _selected(slab: Slab, scans: Scans) -> list[Tensor]:
    return [chosen(slab, scans["cut"][0]), *slab.deltas] if len(slab.deltas) else []
