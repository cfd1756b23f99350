"""Carries out steps tensor by tensor, one stage after the other, results kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from merge_kit.api.forming import is_at_hand
from merge_kit.api.lowering import Lowered
from merge_kit.io.reader import Reader
from merge_kit.plan.cost import sized
from merge_kit.plan.sources import Memory, Merged, Source
from merge_kit.plan.steps import Made
from merge_kit.plan.values import Step
from merge_kit.plan.walk import with_parts, with_sources

if TYPE_CHECKING:
    from torch import Tensor

    from merge_kit.engine.operands import Artefacts

Emit = Callable[[int, "Tensor"], None]
Kept = dict[int, "Tensor"]
"""What a step of an earlier stage yields, flat, by the step's id."""


def computed(made: Made) -> bool:
    """Return whether a tensor is computed or converted, not copied as it is."""
    in_flight = made.held.source.dtype != made.step.outputs[0].spec.dtype
    return made.fate == "merged" or in_flight or not is_at_hand(made.held.source)


def inner_results(
    lowered: Lowered, workers: int, *, allow_nonfinite: bool
) -> tuple[Kept, Artefacts]:
    """Return what the stages before the last yield, in the dtype in which they feed others.

    And what must be found before the last one.
    """
    from merge_kit.engine.in_memory import merge_each  # noqa: PLC0415  (torch)

    kept: Kept = {}
    found = _found(lowered, 0, kept, {})
    for number, stage in enumerate(lowered.stages[:-1]):
        for name, _ in copies(lowered, tuple(m for m in stage if m.step.agree)):
            del name  # only looked at: integers must be equal in all models
        fresh = [m for m in stage if isinstance(m.held.source, Merged)]
        fresh = [m for m in fresh if _id(m.held.source) not in kept]
        steps = [ready(_feeding(m), kept) for m in fresh]

        def keep(index: int, tensor: Tensor, fresh: list[Made] = fresh) -> None:
            kept[_id(fresh[index].held.source)] = tensor.flatten()

        merge_each(
            steps,
            lowered.files,
            keep,
            workers=workers,
            allow_nonfinite=allow_nonfinite,
            found=found,
        )
        found = _found(lowered, number + 1, kept, found)
    return kept, found


def _found(lowered: Lowered, number: int, kept: Kept, found: Artefacts) -> Artefacts:
    """Return what was found, and what must be found before this stage."""
    due = lowered.artefacts[number]
    if not due:
        return found
    from merge_kit.engine.in_memory import find_each  # noqa: PLC0415  (torch)

    at_hand = [replace(one, task=with_sources(one.task, _at_hand(kept))) for one in due]
    return find_each(at_hand, lowered.files, found)


def _id(source: Source) -> int:
    assert isinstance(source, Merged)
    return id(source.step)


def _feeding(made: Made) -> Step:
    """Return a step of a stage that feeds others, with an output of the dtype that it feeds."""
    (target,) = made.step.outputs
    dtype = made.held.source.dtype
    return replace(made.step, outputs=(replace(target, spec=replace(target.spec, dtype=dtype)),))


def ready(step: Step, kept: Kept) -> Step:
    """Return a step with a slab size, whose operands are in files or in memory."""
    at_hand = _at_hand(kept)
    step = replace(
        step,
        base=None if step.base is None else at_hand(step.base),
        inputs=tuple(at_hand(source) for source in step.inputs),
        aux=tuple((name, at_hand(source)) for name, source in step.aux),
    )
    return sized(step, None)


def _at_hand(kept: Kept) -> Callable[[Source], Source]:
    """Return what puts what is kept in the place of results of stages."""

    def change(source: Source) -> Source:
        if isinstance(source, Merged):
            return Memory(kept[id(source.step)], source.dtype, source.shape)
        return with_parts(source, change)

    return change


def copies(lowered: Lowered, stage: tuple[Made, ...]) -> Iterator[tuple[str, Tensor]]:
    """Yield what passes through a stage unchanged, checked to be equal where it must be."""
    from merge_kit.engine.in_memory import check_equal, fetch  # noqa: PLC0415  (torch)

    with Reader(lowered.files) as reader:
        for made in stage:
            if not computed(made):
                check_equal(reader, made.step)
                yield made.item.name, fetch(reader, made.held.source)
        reader.check_all()
