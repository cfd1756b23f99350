"""Results of stages that are read before a run: each is computed once, and kept in scratch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from merge_kit.core.tensors import TensorSpec
from merge_kit.methods.base import Grain
from merge_kit.methods.passthrough import Passthrough
from merge_kit.plan.building.routers_tasks import HiddenRouters
from merge_kit.plan.cost import scratch_bytes
from merge_kit.plan.sources import Source
from merge_kit.plan.spilling import feeds, with_spills
from merge_kit.plan.values import Artefact, Step, Target
from merge_kit.plan.walk import sources_in


class _Whole(Passthrough):
    """Takes a tensor whole, so that what feeds it is computed once and kept in scratch."""

    def residency(self) -> Grain:
        return "tensor"


def standing(source: Source) -> Step:
    """Return a step that reads a source whole, which results of stages feed."""
    dtype = "F64" if source.dtype == "F64" else "F32"
    spec = TensorSpec("found", dtype, source.shape)
    step = Step(
        action="merge",
        outputs=(Target("found", spec, -1, 0),),
        inputs=(source,),
        models=("found",),
        method=_Whole(),
        weights=(1.0,),
        compute="F64" if source.dtype == "F64" else "F32",
    )
    return with_spills(step)


def standing_bytes(artefacts: Sequence[Artefact]) -> int:
    """Return the most scratch that finding one of these takes; it is given back after each."""
    return max((_bytes(one) for one in artefacts), default=0)


def _bytes(artefact: Artefact) -> int:
    task = artefact.task
    if not isinstance(task, HiddenRouters):
        return _sum(sources_in(task))
    layers = max((_sum(layer.values()) for layer in task.weights), default=0)
    return layers + _sum([task.question.embedding])  # layers give theirs back one by one


def _sum(sources: Iterable[Source]) -> int:
    fed = {id(source): source for source in sources if feeds(source)}
    return sum(scratch_bytes(standing(source)) for source in fed.values())
