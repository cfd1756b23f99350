"""A step as phases of parts: spills, scans, the merge or the copy, the hash."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from merge_kit.core.hashing import digests, tensor_hash
from merge_kit.core.tensors import BLOCK, nbytes
from merge_kit.engine.diagnose import not_finite
from merge_kit.engine.journal import FOLDER, Finished
from merge_kit.engine.kernel import Kernel, NotFinite
from merge_kit.engine.pool import Task
from merge_kit.engine.state import RunState
from merge_kit.engine.statistics import InOrder, Passes, chunks, gather, ranges, slabs
from merge_kit.engine.workspace import Workspace
from merge_kit.io.torch_dtypes import torch_dtype
from merge_kit.methods.reductions import CHUNK
from merge_kit.methods.rounding import round_into
from merge_kit.plan.sources import Merged, Stored
from merge_kit.plan.values import Step
from merge_kit.plan.walk import merged_sources
from merge_kit.plan.whole_model import Group, group_of

Span = tuple[int, int]
Part = Callable[[int, Span, Workspace], None]
Phase = tuple[Sequence[Span], Part]
Shared = Mapping[Group, Mapping[str, Any]]
"""Results of statistics over the whole model: group of steps -> name -> result."""


class Job(ABC):
    """One step on its way through phases; the parts of a phase run at the same time."""

    def __init__(self, run: RunState, step: Step, name: str) -> None:
        self.run, self.step = run, step
        self.kernel = Kernel(run.reader, allow_nonfinite=run.allow_nonfinite, found=run.found)
        self._scratch = run.folder / FOLDER / f"scratch-{name}"
        self._phases = self.phases()
        self._left = 0
        self._lock = threading.Lock()

    @abstractmethod
    def phases(self) -> Iterator[Phase]:
        """Yield runs of elements and what to do with each, in order."""

    def begin(self, work: Workspace) -> Sequence[Task]:
        """Run, as a task, as far as there is one part only; return the parts of what is next."""
        while (phase := next(self._phases, None)) is not None:
            spans, part = phase
            if len(spans) == 1:
                self._do(part, 0, spans[0], work)
                continue
            self._left = len(spans)
            return [self._task(part, i, span) for i, span in enumerate(spans)]
        return ()

    def _task(self, part: Part, index: int, span: Span) -> Task:
        def task(work: Workspace) -> Sequence[Task]:
            self._do(part, index, span, work)
            with self._lock:
                self._left -= 1
                last = self._left == 0
            return self.begin(work) if last else ()

        return task

    def _do(self, part: Part, index: int, span: Span, work: Workspace) -> None:
        work.scratch = self._scratch
        method = self.step.method
        whole = method is not None and method.residency() == "tensor"
        with self.run.heavy.take(self.step.peak_bytes) if whole else nullcontext():
            try:
                part(index, span, work)
            except NotFinite as error:
                raise not_finite(self.kernel, error.step or self.step, work) from None
            finally:
                if whole:
                    work.release()

    def prepare(self, shared: Shared) -> Iterator[Phase]:
        """Yield what the steps that feed this one need, and spill those that are to be."""
        for source in merged_sources(self.step):
            yield from self.statistics(source.step, shared)
            if source.spill is not None:
                yield self._spilling(source, source.spill)

    def statistics(self, step: Step, shared: Shared) -> Iterator[Phase]:
        """Yield the passes of a step's scans over its own tensor."""
        assert step.method is not None  # copies have none
        known = shared.get(group_of(step), {})
        passes = Passes([s for s in step.method.scans() if s.scope == "tensor"], known)
        while passes.due():
            fold = InOrder()
            yield chunks(step, passes), self.gathering(step, passes, fold, 0)
            passes.finish(fold.total)
        self.kernel.scans[id(step)] = passes.results

    def gathering(self, step: Step, passes: Passes, fold: InOrder, first: int) -> Part:
        """Return a part that gathers one chunk, the `first`-th of the fold or later."""

        def part(index: int, span: Span, work: Workspace) -> None:
            fold.put(first + index, gather(self.kernel, step, passes, span, work))

        return part

    def _spilling(self, source: Merged, offset: int) -> Phase:
        writer, dtype, step = self.run.writer, source.dtype, source.step
        writer.ensure(self._scratch)

        def part(index: int, span: Span, work: Workspace) -> None:
            del index
            for start, stop in slabs(step, span):
                (merged,) = self.kernel.merge(step, self.kernel.load(step, start, stop, work))
                raw, memory = work.bytes("out", nbytes(dtype, merged.numel()))
                round_into(merged, raw.view(torch_dtype(dtype)))
                writer.write(self._scratch, offset + nbytes(dtype, start), memory)

        return ranges(step, CHUNK), part

    def clear(self) -> None:
        """Give back what only this job used."""
        self.kernel.scans.clear()
        self.kernel.facts.clear()
        self.run.reader.forget(self._scratch)
        self.run.writer.discard(self._scratch)


class ScanJob(Job):
    """One pass of a whole-model statistic over one step."""

    def __init__(
        self,
        run: RunState,
        step: Step,
        name: str,
        shared: Shared,
        passes: Passes,
        fold: InOrder,
        first: int,
    ) -> None:
        self._shared = shared
        self._passes, self._fold, self._first = passes, fold, first
        super().__init__(run, step, name)

    def phases(self) -> Iterator[Phase]:
        """Yield what the step needs, then its chunks."""
        yield from self.prepare(self._shared)
        part = self.gathering(self.step, self._passes, self._fold, self._first)
        yield chunks(self.step, self._passes), part
        self.clear()


class OutputJob(Job):
    """A step whose outputs are written."""

    def __init__(self, run: RunState, index: int, step: Step) -> None:
        super().__init__(run, step, str(index))
        self.index = index
        self.digests: dict[Span, bytes] = {}

    def finish(self) -> None:
        """Enter the hashes into the journal."""
        hashes = {}
        for i, target in enumerate(self.step.outputs):
            joined = (self.digests[key] for key in sorted(self.digests) if key[0] == i)
            hashes[target.key] = tensor_hash(b"".join(joined))
        tally, facts = self.run.tally, self.kernel.facts_by_key(self.step)
        with tally.lock:
            tally.hashes.update(hashes)
            tally.facts.update(facts)
            nonfinite = {key: tally.nonfinite[key] for key in hashes if key in tally.nonfinite}
            saturated = {key: tally.saturated[key] for key in hashes if key in tally.saturated}
        self.run.journal.write(self.index, Finished(hashes, nonfinite, saturated, facts))
        self.clear()


class MergeJob(OutputJob):
    """A step that computes."""

    def __init__(self, run: RunState, index: int, step: Step, shared: Shared) -> None:
        self._shared = shared
        super().__init__(run, index, step)

    def phases(self) -> Iterator[Phase]:
        """Yield preparations, scans, the merge, and the hash where slabs are no blocks."""
        yield from self.prepare(self._shared)
        yield from self.statistics(self.step, self._shared)
        yield ranges(self.step, CHUNK), self._merge
        if not self._from_blocks():
            yield [(0, 0)], self._hash
        self.finish()

    def _from_blocks(self) -> bool:
        """Return whether what is written at once starts at a block, or is all there is."""
        assert self.step.method is not None
        return self.step.method.residency() != "row"

    def _merge(self, index: int, span: Span, work: Workspace) -> None:
        run, step, kernel = self.run, self.step, self.kernel
        found: list[list[bytes]] = [[] for _ in step.outputs]
        for start, stop in slabs(step, span):
            merged = kernel.merge(step, kernel.load(step, start, stop, work))
            for joined, target, values in zip(found, step.outputs, merged, strict=True):
                joined.append(run.emit(target, start, values, work))
        if self._from_blocks():
            for i, joined in enumerate(found):
                self.digests[i, index] = b"".join(joined)

    def _hash(self, index: int, span: Span, work: Workspace) -> None:
        del index, span
        for i, target in enumerate(self.step.outputs):
            self.digests[i, 0] = self.run.read_back(target, work)


class CopyJob(OutputJob):
    """A step that moves bytes unchanged."""

    def phases(self) -> Iterator[Phase]:
        """Yield the pieces of the tensor."""
        total = self.step.outputs[0].spec.numel
        starts = range(0, max(total, 1), CHUNK)
        yield [(at, min(at + CHUNK, total)) for at in starts], self._copy
        self.finish()

    def _copy(self, index: int, span: Span, work: Workspace) -> None:
        run, target, source = self.run, self.step.outputs[0], self.step.inputs[0]
        assert isinstance(source, Stored)  # the planner merges what is not
        dtype, path, out = target.spec.dtype, source.span.path, run.path(target)
        start, stop = (nbytes(dtype, at) for at in span)
        step = 4 * nbytes(dtype, BLOCK)

        def through(offset: int, count: int) -> None:
            for at in range(offset, offset + count, step):
                _, memory = work.bytes("out", min(step, offset + count - at))
                run.reader.read_into(path, source.span.start + start + at, memory)
                run.writer.write(out, target.offset + start + at, memory)

        run.writer.copy(
            run.reader.descriptor(path),
            source.span.start + start,
            out,
            target.offset + start,
            stop - start,
            through,
        )
        known = run.repeats.known(source, index)
        if known is None:
            found = []
            for at in range(start, stop, step):
                _, memory = work.bytes("out", min(step, stop - at))
                run.reader.read_into(path, source.span.start + at, memory)
                found.append(digests(memory, dtype))
            known = b"".join(found)
            run.repeats.add(source, index, known)
        self.digests[0, index] = known
        run.tally.moved(stop - start, target.key)
