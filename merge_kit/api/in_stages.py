"""Carries out steps tensor by tensor, one stage after the other, results kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from merge_kit.api.forming import is_at_hand
from merge_kit.api.lowering import Lowered
from merge_kit.io.reader import Reader
from merge_kit.plan.cost import sized
from merge_kit.plan.sources import Memory, Merged, Source
from merge_kit.plan.steps import Made
from merge_kit.plan.values import Step
from merge_kit.plan.walk import feeding, with_parts, with_sources

if TYPE_CHECKING:
    from torch import Tensor

    from merge_kit.engine.operands import Artefacts

Run = Callable[..., None]
"""Computes steps: (steps, files, what takes each result)."""

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
        run = partial(merge_each, workers=workers, allow_nonfinite=allow_nonfinite, found=found)
        _between([made.step for made in stage], lowered, kept, run)
        _keep(
            [m.held.source for m in stage if isinstance(m.held.source, Merged)], lowered, kept, run
        )
        found = _found(lowered, number + 1, kept, found)
    run = partial(merge_each, workers=workers, allow_nonfinite=allow_nonfinite, found=found)
    _between([made.step for made in lowered.stages[-1]], lowered, kept, run)
    return kept, found


def _between(steps: Sequence[Step], lowered: Lowered, kept: Kept, run: Run) -> None:
    """Keep what feeds steps and is no result of a stage: results of inputs that are chosen."""
    while missing := _missing(steps, kept):
        _keep(missing, lowered, kept, run)


def _missing(steps: Sequence[Step], kept: Kept) -> list[Merged]:
    """Return what feeds steps, is not kept, and can be computed of what is kept."""
    found: dict[int, Merged] = {}
    pending = [source for step in steps for source in feeding(step)]
    while pending:
        source = pending.pop()
        if id(source.step) in kept or id(source.step) in found:
            continue
        inner = [one for one in feeding(source.step) if id(one.step) not in kept]
        pending += inner
        if not inner:
            found[id(source.step)] = source
    return list(found.values())


def _keep(sources: Sequence[Merged], lowered: Lowered, kept: Kept, run: Run) -> None:
    """Compute results, and keep them in the dtype in which they feed others."""
    fresh = list({id(one.step): one for one in sources if id(one.step) not in kept}.values())
    steps = [ready(_feeding(one), kept) for one in fresh]

    def keep(index: int, tensor: Tensor) -> None:
        kept[id(fresh[index].step)] = tensor.flatten()

    run(steps, lowered.files, keep)


def _found(lowered: Lowered, number: int, kept: Kept, found: Artefacts) -> Artefacts:
    """Return what was found, and what must be found before this stage."""
    due = lowered.artefacts[number]
    if not due:
        return found
    from merge_kit.engine.in_memory import find_each  # noqa: PLC0415  (torch)

    at_hand = [replace(one, task=with_sources(one.task, _at_hand(kept))) for one in due]
    return find_each(at_hand, lowered.files, found)


def _feeding(source: Merged) -> Step:
    """Return a step that feeds others, with an output of the dtype that it feeds."""
    step, dtype = source.step, source.dtype
    (target,) = step.outputs
    return replace(step, outputs=(replace(target, spec=replace(target.spec, dtype=dtype)),))


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
