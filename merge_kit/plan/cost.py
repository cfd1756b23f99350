"""What steps take: slab sizes, memory, bytes read, scratch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from merge_kit.core.sizes import format_size
from merge_kit.core.tensors import BLOCK, nbytes
from merge_kit.errors import MergeKitError, PlanError
from merge_kit.plan.code_memory import code_bytes
from merge_kit.plan.process import process_bytes
from merge_kit.plan.residency import projected_passes
from merge_kit.plan.sources import (
    Chosen,
    Merged,
    Normed,
    Projected,
    Source,
    Stored,
    View,
    elements,
)
from merge_kit.plan.step_memory import (
    float_bytes,
    flops,
    rows_bytes,
    slab_bytes,
)
from merge_kit.plan.values import Bill, Step
from merge_kit.plan.walk import merged_sources, operands, parts, stored, with_parts

CACHE_BYTES = 7_000_000
"""Floats of a slab that a worker works on best: larger ones leave the cache, smaller ones wait for
one another more often."""

MANY_WHOLE_BYTES = 2 * 2**30
"""Whole tensors are merged at the same time up to so much memory, one alone whatever it takes."""

MOST_BLOCKS = 8
MOST_WORKERS = 1024
_TENSOR_BYTES = 4_000  # of the plan and the journal, for each tensor of an input or output


def worker_count(threads: int | None) -> int:
    """Return how many workers to use: as asked, or one for each processor, at most 8."""
    if threads is not None:
        whole = isinstance(threads, int) and not isinstance(threads, bool)
        if not whole or not 1 <= threads <= MOST_WORKERS:
            raise PlanError(f"threads is {threads!r}, expected 1 to {MOST_WORKERS}")
        return threads
    if hasattr(os, "sched_getaffinity"):
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)


def slab_elements(step: Step, blocks: int | None) -> int:
    """Return the elements of a step's slabs: whole blocks, or whole rows of about that many."""
    if blocks is None:
        blocks = min(MOST_BLOCKS, max(1, CACHE_BYTES // (float_bytes(step) * BLOCK)))
    return blocks * BLOCK


def is_whole(step: Step) -> bool:
    """Return whether a step needs whole tensors, which are merged one at a time."""
    return step.method is not None and step.method.residency() == "tensor"


def sized(step: Step, blocks: int | None, known: dict[int, Merged] | None = None) -> Step:
    """Return a step with its slab size and peak memory, and so the steps that feed it.

    Args:
        known: Feeding steps that are done, by the id of the one before; what is shared stays so.
    """
    known = {} if known is None else known
    step = replace(
        step,
        base=None if step.base is None else _sized_source(step.base, blocks, known),
        inputs=tuple(_sized_source(s, blocks, known) for s in step.inputs),
        aux=tuple((name, _sized_source(s, blocks, known)) for name, s in step.aux),
    )
    slab = slab_elements(step, blocks)
    return replace(step, slab_elements=slab, peak_bytes=slab_bytes(step, slab))


def _sized_source(source: Source, blocks: int | None, known: dict[int, Merged]) -> Source:
    if not isinstance(source, Merged):
        return with_parts(source, lambda part: _sized_source(part, blocks, known))
    if id(source) not in known:
        known[id(source)] = replace(source, step=sized(source.step, blocks, known))
    return known[id(source)]


def heavy_bytes(steps: Sequence[Step], workers: int, *, sparing: bool = False) -> int:
    """Return the memory of whole tensors that are merged at the same time.

    Args:
        sparing: Whether the largest is all there is room for.
    """
    heaviest = max((s.peak_bytes for s in steps if is_whole(s)), default=0)
    return heaviest if sparing else max(heaviest, min(workers * heaviest, MANY_WHOLE_BYTES))


def peak_bytes(steps: Sequence[Step], workers: int, tensors: int, *, sparing: bool = False) -> int:
    """Return the resident memory of the whole process."""
    some = [(rows_bytes(s), s.peak_bytes) for s in steps if not is_whole(s)]
    light = max((rows for rows, _ in some), default=0)
    light += max((peak - rows for rows, peak in some), default=0)
    heavy = heavy_bytes(steps, workers, sparing=sparing)
    code = code_bytes(steps)
    return process_bytes() + code + workers * light + heavy + _TENSOR_BYTES * tensors


def fit(
    steps: Sequence[Step],
    workers: int,
    tensors: int,
    memory_bytes: int | None,
    sizes: Sequence[int | None] | None = None,
) -> tuple[tuple[Step, ...], int]:
    """Return the steps with slabs that fit the budget, and the peak memory.

    Args:
        sizes: Blocks of a slab to try in this order; None for what fits the cache.

    Raises:
        PlanError: If not even slabs of one block fit.
    """
    best: tuple[tuple[Step, ...], int] | None = None
    for blocks in sizes or (None, 2, 1):
        made = tuple(sized(step, blocks) for step in steps)
        for sparing in (False, True):
            peak = peak_bytes(made, workers, tensors, sparing=sparing)
            if memory_bytes is None or peak <= memory_bytes:
                return made, peak
            best = (made, peak) if best is None or peak < best[1] else best
    assert best is not None
    raise _too_large(best[0], best[1], memory_bytes or 0, workers)


def _too_large(steps: Sequence[Step], peak: int, budget: int, workers: int) -> MergeKitError:
    worst = max(steps, key=lambda step: step.peak_bytes)
    return PlanError(
        f"the budget is {format_size(budget)}, and the run needs {format_size(peak)}: "
        f"{format_size(process_bytes())} for Python and torch, {format_size(worst.peak_bytes)} "
        f"a worker for {worst.outputs[0].key}",
        where="--memory",
        hint=f"raise --memory{', or lower --threads' if workers > 1 else ''}",
    )


def passes(step: Step) -> int:
    """Return how often the operands are read, at least."""
    if step.action == "copy" or step.method is None:
        return 1
    scans = step.method.scans()
    depth: dict[str, int] = {}
    for scan in scans:
        depth[scan.name] = 1 + max((depth.get(name, 0) for name in scan.uses), default=0)
    return 1 + max(depth.values(), default=0)


def read_bytes(step: Step) -> int:
    """Return bytes read from input files, repeated passes included."""
    total = passes(step) * sum(once_bytes(source) for source in operands(step))
    return total + sum(s.span.nbytes for a in step.agree for s in stored(a)) * 2


def _is_look(step: Step) -> bool:
    """Return whether a step that is no output is more than scanned: all of it is computed."""
    return step.shape is not None or step.action == "copy"


def once_bytes(source: Source) -> int:
    """Return the bytes of one pass over a source, with what it reads again for itself.

    Lengths of columns take a pass of their own, and a left factor one for each strip. Of several
    sources one is chosen, and of a tensor that is viewed only the view is read.
    """
    match source:
        case Stored():
            return nbytes(source.dtype, elements(source))
        case View() if isinstance(source.source, Stored):
            return nbytes(source.dtype, elements(source))
        case Chosen():
            return max(once_bytes(one) for one in parts(source))
        case Merged():
            return sum(once_bytes(one) for one in operands(source.step))
    total = sum(once_bytes(part) for part in parts(source))
    if isinstance(source, Normed) and source.axis == 1:
        return total + once_bytes(source.source)
    if isinstance(source, Projected):
        return total + (projected_passes(source) - 1) * once_bytes(source.source)
    return total


def scratch_bytes(step: Step) -> int:
    """Return bytes that a step spills."""
    spills = [m for m in merged_sources(step) if m.spill is not None]
    return sum(nbytes(m.dtype, elements(m)) for m in spills)


def bill(
    steps: Sequence[Step],
    workers: int,
    peak: int,
    scanned: Sequence[Step] = (),
    tensors: int = 0,
) -> Bill:
    """Return what a run takes.

    Args:
        peak: What `fit` returned.
        scanned: Steps that are only scanned, for statistics over a whole model, or looked at.
        tensors: As given to `fit`.
    """
    every = (*steps, *scanned)
    most = sorted((scratch_bytes(step) for step in every), reverse=True)
    sparing = peak < peak_bytes(every, workers, tensors)
    heavy = heavy_bytes(every, workers, sparing=sparing)
    heaviest = max((s.peak_bytes for s in every if is_whole(s)), default=0)
    return Bill(
        read_bytes=sum(read_bytes(step) for step in (*steps, *scanned)),
        written_bytes=sum(t.spec.nbytes for step in steps for t in step.outputs),
        scratch_bytes=sum(most[: workers + 1]),
        peak_bytes=peak,
        workers=workers,
        heavy_bytes=heavy,
        flops=sum(flops(step) for step in (*steps, *filter(_is_look, scanned))),
        solves=sum(flops(step) > 0 for step in steps),
        solvers=min(workers, heavy // heaviest) if heaviest else workers,
    )
