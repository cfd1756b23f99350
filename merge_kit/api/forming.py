"""Tensors that no file holds as they are: formed when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from merge_kit.io.values import WeightFile
from merge_kit.methods.passthrough import Passthrough
from merge_kit.plan.cost import sized, worker_count
from merge_kit.plan.models import Held
from merge_kit.plan.sources import Memory, Source, Stored
from merge_kit.plan.values import Step, Target

if TYPE_CHECKING:
    from torch import Tensor


def is_at_hand(source: Source) -> bool:
    """Return whether a file or memory holds a tensor as it is."""
    return isinstance(source, Stored | Memory)


def formed(tensors: Sequence[Held], files: Iterable[WeightFile]) -> list[Tensor]:
    """Return tensors with the bits that a merge that passes them through gives.

    Raises:
        NonFiniteError: If one is not finite.
        CheckpointError: If a file cannot be read or has changed.
    """
    from merge_kit.engine.in_memory import merge_each  # noqa: PLC0415  (torch, when it is needed)

    found: dict[int, Tensor] = {}
    steps = [sized(_step(held), None) for held in tensors]
    merge_each(steps, files, found.__setitem__, workers=worker_count(None))
    return [found[i] for i in range(len(steps))]


def _step(held: Held) -> Step:
    return Step(
        action="merge",
        outputs=(Target(held.spec.name, held.spec, -1, 0),),
        inputs=(held.source,),
        models=("input",),
        method=Passthrough(),
        weights=(1.0,),
        compute="F64" if held.source.dtype == "F64" else "F32",
    )
