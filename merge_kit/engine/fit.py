"""Looks at the weights for what the output's layout depends on: the ranks of adapters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from merge_kit.engine.agreement import equal_bytes
from merge_kit.engine.jobs import Job, Phase, Shared, Span
from merge_kit.engine.kernel import NO_SCANS
from merge_kit.engine.opening import opened
from merge_kit.engine.pool import Pool
from merge_kit.engine.progress import Progress
from merge_kit.engine.state import RunState, Tally
from merge_kit.engine.whole_model import starting, whole_model
from merge_kit.engine.workspace import Workspace
from merge_kit.errors import InterruptedRun
from merge_kit.io.torch_dtypes import torch_dtype
from merge_kit.methods.updates import AdapterMethod
from merge_kit.plan.cost import read_bytes
from merge_kit.plan.residency import PIECE
from merge_kit.plan.sources import Source, Stored, elements
from merge_kit.plan.values import Fitted, Plan, Step
from merge_kit.plan.walk import merged_sources
from merge_kit.plan.whole_model import Group, group_of

JOURNAL = "fitted.jsonl"


def fit_plan(
    plan: Plan,
    folder: Path,
    *,
    allow_nonfinite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
) -> tuple[Fitted, ...]:
    """Return what the plan's fits find, in their order: one for each adapter that a step makes.

    The key of each is that of the adapter's first output in the step (its a), as the plan has it.
    A fit with the action "copy" asks whether inputs[0] and base hold the same bytes: rank 0 if so,
    else 1. What is found is kept in the folder, and a later call goes on from there.

    Args:
        allow_nonfinite: Let NaN and infinities pass, instead of stopping.
        on_progress: Called from worker threads, one call at a time, with bytes read.
        stop: Set it to end early.

    Raises:
        NonFiniteError: If inputs are not finite and that is not allowed.
        CheckpointError: If an input cannot be read or changed since the plan was made.
        OutputError: If the disk or the system refuses a write.
        InterruptedRun: If `stop` was set.
    """
    stop = stop or threading.Event()
    tally = Tally(sum(read_bytes(step) for step in plan.fits), on_progress)
    with opened(plan, folder, tally, allow_nonfinite=allow_nonfinite, journal=JOURNAL) as run:
        found = _known(run)
        left = [(i, step) for i, step in enumerate(plan.fits) if i not in found]
        shared = whole_model(run, _scanned(plan, [step for _, step in left]), stop)
        jobs = (partial(FitJob, run, i, step, shared, found) for i, step in left)
        Pool(plan.bill.workers, stop).run([starting(job) for job in jobs])
        if stop.is_set():
            raise InterruptedRun(2, hint="run the same command again to go on from here")
        run.reader.check_all()
    return tuple(one for i in range(len(plan.fits)) for one in found[i])


def _scanned(plan: Plan, steps: Sequence[Step]) -> list[Step]:
    """Return the steps whose statistics over a whole model these need, or those that feed them."""
    found: list[Step] = []
    groups, left = set[Group](), list(steps)
    while left:
        fresh = {group_of(m.step) for step in left for m in merged_sources(step)} - groups
        left = [step for step in plan.whole_model if group_of(step) in fresh]
        groups |= fresh
        found += left
    return found


def _known(run: RunState) -> dict[int, list[Fitted]]:
    """Return what earlier runs found, by index of the step; entries of other plans are left out."""
    known = {}
    for index, entry in run.journal.entries():
        try:
            found = [Fitted(**one) for one in entry["fitted"]]
        except (KeyError, TypeError):
            continue  # it is looked at again
        if index < len(run.plan.fits) and _keys(run.plan.fits[index]) == [f.key for f in found]:
            known[index] = found
            run.tally.moved(read_bytes(run.plan.fits[index]), found[0].key)
    return known


def _keys(step: Step) -> list[str]:
    return [target.key for target in step.outputs[:: 1 if step.method is None else 2]]


class FitJob(Job):
    """A step that is looked at before the layout is known."""

    def __init__(
        self,
        run: RunState,
        index: int,
        step: Step,
        shared: Shared,
        found: dict[int, list[Fitted]],
    ) -> None:
        self.index, self._shared, self._found = index, shared, found
        super().__init__(run, step, f"fit-{index}")

    def phases(self) -> Iterator[Phase]:
        """Yield preparations and scans, then the look."""
        yield from self.prepare(self._shared)
        if self.step.method is None:
            yield [(0, 0)], self._compare
        else:
            yield from self.statistics(self.step, self._shared)
            yield [(0, 0)], self._fit
        self._finish()

    def _finish(self) -> None:
        found = self._found[self.index]
        self.run.journal.add(self.index, {"fitted": [asdict(one) for one in found]})
        self.run.tally.moved(read_bytes(self.step), found[0].key)
        self.clear()

    def _fit(self, index: int, span: Span, work: Workspace) -> None:
        del index, span
        step, kernel = self.step, self.kernel
        assert isinstance(step.method, AdapterMethod)  # nothing else is fitted
        slab = kernel.load_whole(step, work)
        kernel.check_finite(step, slab)
        spectra = step.method.fit(slab, kernel.scans.get(id(step), NO_SCANS))
        self._found[self.index] = [
            Fitted(key, one.rank, one.norm) for key, one in zip(_keys(step), spectra, strict=True)
        ]

    def _compare(self, index: int, span: Span, work: Workspace) -> None:
        del index, span
        (one,), other = self.step.inputs, self.step.base
        assert other is not None  # what is asked is whether they are equal
        rank = 0 if self._equal(one, other, work) else 1
        self._found[self.index] = [Fitted(key, rank, 0.0) for key in _keys(self.step)]

    def _equal(self, one: Source, other: Source, work: Workspace) -> bool:
        if one.shape != other.shape:
            return False
        if isinstance(one, Stored) and isinstance(other, Stored):
            alike = one.dtype == other.dtype
            return alike and equal_bytes(self.run.reader, one.span, other.span)
        work.enter(self.step)
        kind, total = torch_dtype(self.step.compute), elements(one)
        size = min(PIECE, self.step.slab_elements)
        for start in range(0, total, size):
            stop = min(start + size, total)
            rows = work.rows("models", 2, stop - start, kind)
            for row, source in zip(rows, (one, other), strict=True):
                self.kernel.operands.read(source, start, stop, row, work)
            if not torch.equal(rows[0], rows[1]):
                return False
        return True
