"""Averages weighted by Fisher information."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from merge_kit.errors import ParameterError
from merge_kit.methods import evidence
from merge_kit.methods.base import Law, MergeMethod, PerModel, Scan, Scans, Slab, per_model
from merge_kit.methods.lazy import torch
from merge_kit.methods.reductions import Gram
from merge_kit.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor

_LEAST, _MOST = 1e-37, 1e37  # what float32 holds with all its digits


@register("fisher")
@dataclass(frozen=True, kw_only=True)
class Fisher(MergeMethod):
    """Average each parameter by how much each model's data say about it (Fisher merging).

    out = sum(w_i F_i x_i) / sum(w_i F_i), element by element

    F_i is the diagonal of the Fisher information of model i, from a file. It is first divided by
    its root mean square over the whole model (normalize_fisher), then raised to floor where it is
    less.

    The statistics file is a safetensors file (or a folder of them) with one tensor for each
    tensor of the model: same name, same shape, float, no value below 0.
    scripts/collect_statistics.py makes it. Metadata `shared`, a JSON object {name: stored name},
    lets several names stand for one tensor. A tensor without statistics is an error; rules under
    `tensors` can take it from one model. The file is looked up beside the recipe, then in the
    working directory.

    Models whose F_i are equal, and elements for which no model has evidence (F below the floor in
    all of them), get the plain weighted mean. A base lends config and tokenizer and is not read.

    The authors' code divides by the norm and not the root mean square: the same ratios between
    models, but their floor is a number before that division, so that it means something else for
    every loss; normalize_fisher: false gives floor that meaning. It raises only the first model
    to the floor (favor_first: true): what no model has evidence for, the first model decides.

    Attributes:
        statistics: Path of each model's statistics file.
        weight: Weight of each model's evidence, from 0, not all 0; only their ratios count.
        normalize_fisher: Whether each F is divided by its root mean square over all tensors that
            the stage merges by this method (each by as many models), so that no model outweighs
            another only because its loss was on another scale.
        floor: Smallest F, from 0 (then 1e-37).
        favor_first: Whether only the first model's F is raised to the floor.

    Cost: two passes, one if normalize_fisher is false; reads a file of statistics for each model.
    Source: Matena and Raffel 2022, Merging models with Fisher-weighted averaging,
        https://arxiv.org/abs/2111.09832
    """

    takes_base: ClassVar[bool] = True
    statistics_of: ClassVar = "elements"
    error_factor: ClassVar[float] = 4.0  # each F is rounded five times before it is a share
    laws: ClassVar[Mapping[Law, float]] = {
        "single": 0.0,
        "copies": 2.0**-20,
        "permute_models": 2.0**-20,
        "permute_rows": 2.0**-20,
    }

    statistics: PerModel[str]
    weight: PerModel[float] = per_model(1.0)
    normalize_fisher: bool = True
    floor: float = 1e-6
    favor_first: bool = False

    def __post_init__(self) -> None:
        evidence.check_weights(self.weight)
        if not 0 <= self.floor <= _MOST:
            raise ParameterError("floor", f"is {self.floor:g}, expected a number in [0, 1e37]")

    def scans(self) -> Sequence[Scan]:
        """Return the squared norm of each model's F, and the number of elements."""
        if not self.normalize_fisher:
            return []
        rows = [("elements", _ones)]
        rows += [(f"square {i}", partial(_row, model=i)) for i in range(len(self.weight))]
        return [Scan(name, Gram(), of=of, scope="model") for name, of in rows]

    def scratch_bytes(self, models: int, elements: int) -> int:
        """Return the bytes of the largest F, and of the ones that are counted."""
        del models
        return 16 * elements

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the average; overwrites models and statistics."""
        weights = self.weight or PerModel([1.0] * len(slab.tensors))
        used = [i for i, weight in enumerate(weights) if weight > 0]
        if len(used) == 1:
            return slab.tensors[used[0]]
        floored = used[:1] if self.favor_first else used
        rows = [self._evidence(slab, i, scans, floored=i in floored) for i in used]
        largest = rows[0].clone()
        for row in rows[1:]:
            torch.maximum(largest, row, out=largest)
        total, mass = slab.tensors[used[0]], rows[0]
        parts = zip(used, rows, evidence.shares([weights[i] for i in used]), strict=True)
        for i, row, share in parts:
            row.div_(largest).mul_(share)  # of the largest at most, so that nothing overflows
            slab.tensors[i].mul_(row)
            if i != used[0]:
                total.add_(slab.tensors[i])
                mass.add_(row)
        return total.div_(mass)

    def _evidence(self, slab: Slab, model: int, scans: Scans, *, floored: bool) -> Tensor:
        """Return one model's F, scaled, and not below the floor if it is floored."""
        found = evidence.of_model(slab, model)
        if found is None:  # no model has any
            return torch.ones_like(slab.tensors[model])
        row = evidence.check_range(found, slab, model, least=0)
        if self.normalize_fisher:
            square = float(scans[f"square {model}"][0, 0])
            elements = float(scans["elements"][0, 0])
            if square > 0:
                row.mul_(min((elements / square) ** 0.5, _MOST))
        return row.clamp_(min=max(self.floor, _LEAST)) if floored else row


def _row(slab: Slab, scans: Scans, *, model: int) -> list[Tensor]:
    del scans
    found = evidence.of_model(slab, model)
    return _ones(slab, {}) if found is None else [evidence.check_range(found, slab, model, least=0)]


def _ones(slab: Slab, scans: Scans) -> list[Tensor]:
    del scans
    return [torch.ones_like(slab.tensors[0])]
