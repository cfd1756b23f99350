"""Differences between models: their sums tensor by tensor, and the dot products of such sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from merge_kit.api.held import HeldModel
from merge_kit.api.lowering import Lowered, Request, lower
from merge_kit.methods.base import MergeMethod, Scan, Scans, Slab
from merge_kit.methods.reductions import Gram
from merge_kit.plan.cost import sized, worker_count
from merge_kit.plan.values import Step

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Pair:
    """A weighted difference, weight * (model - base)."""

    weight: float
    model: HeldModel
    base: HeldModel


Sum = tuple[Pair, ...]
Products = Sequence[Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Differences(MergeMethod):
    """Sums of weighted differences; the first is the result, or all are multiplied.

    Attributes:
        sums: (weight, position of the model, position of its base) for each difference.
        multiplied: Whether their dot products are scanned.
    """

    sums: tuple[tuple[tuple[float, int, int], ...], ...]
    multiplied: bool

    def scans(self) -> Sequence[Scan]:
        """Return the dot products of the sums, if they are wanted."""
        return [Scan("products", Gram(), of=self._rows)] if self.multiplied else []

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the first sum."""
        return self._rows(slab, scans)[0]

    def _rows(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the sums, (sums, elements); in order, so that slabs do not matter."""
        del scans
        found, models = slab.tensors.new_zeros(len(self.sums), slab.tensors.shape[1]), slab.tensors
        for total, terms in zip(found, self.sums, strict=True):
            for weight, model, base in terms:
                total.add_(models[model] - models[base], alpha=weight)
        return found


def difference(pairs: Sum) -> dict[str, Tensor]:
    """Return a sum of differences by tensor, float32, or float64 where a model is float64.

    Integer and bool tensors are left out.
    """
    from merge_kit.engine.in_memory import merge_each  # noqa: PLC0415  (torch)

    steps, lowered = _steps([pairs], multiplied=False)
    results: dict[str, Tensor] = {}

    def keep(index: int, tensor: Tensor) -> None:
        results[steps[index].outputs[0].key] = tensor

    merge_each(steps, lowered.files, keep, workers=worker_count(None))
    return {step.outputs[0].key: results[step.outputs[0].key] for step in steps}


def products(sums: Sequence[Sum]) -> Mapping[str, Products]:
    """Return the dot products of sums of differences, (sums, sums) in float64, by tensor."""
    from merge_kit.engine.in_memory import scan_each  # noqa: PLC0415  (torch)

    steps, lowered = _steps(sums, multiplied=True)
    found = scan_each(steps, lowered.files, workers=worker_count(None))
    return {s.outputs[0].key: r["products"].tolist() for s, r in zip(steps, found, strict=True)}


def _steps(sums: Sequence[Sum], *, multiplied: bool) -> tuple[list[Step], Lowered]:
    """Return a step for each float tensor: the planner's for the models, with another method."""
    pairs = [pair for pairs in sums for pair in pairs]
    models = {model.key: model for pair in pairs for model in (pair.model, pair.base)}
    at = {key: i for i, key in enumerate(models)}
    request = Request(
        "linear",
        tuple(models.values()),
        parameters={"weight": 1.0, "normalize": False},
        on_conflict="first",  # integers have no difference
    )
    rows = tuple(tuple((p.weight, at[p.model.key], at[p.base.key]) for p in own) for own in sums)
    method = Differences(sums=rows, multiplied=multiplied)
    lowered = lower(request)
    steps = [_with(made.step, method) for made in lowered.made if made.fate == "merged"]
    return steps, lowered


def _with(step: Step, method: Differences) -> Step:
    dtype = "F64" if "F64" in {source.dtype for source in step.inputs} else "F32"
    (target,) = step.outputs
    target = replace(target, spec=replace(target.spec, dtype=dtype))
    return sized(replace(step, method=method, outputs=(target,)), None)
