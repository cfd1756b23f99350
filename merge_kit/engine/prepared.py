"""Operands of what is found before a run: results of other stages are computed first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from merge_kit.core.tensors import nbytes
from merge_kit.engine.jobs import Job, Phase
from merge_kit.engine.kernel import Kernel
from merge_kit.engine.operands import Operands
from merge_kit.engine.pool import Pool
from merge_kit.engine.state import RunState
from merge_kit.engine.whole_model import starting
from merge_kit.engine.workspace import Workspace
from merge_kit.errors import InterruptedRun
from merge_kit.plan.cost import once_bytes, sized
from merge_kit.plan.sources import Source
from merge_kit.plan.spilling import feeds
from merge_kit.plan.standing import standing


class _Standing(Job):
    """What feeds one source, ready to be read in any order."""

    def phases(self) -> Iterator[Phase]:
        """Yield the computing of what feeds the source."""
        yield from self.prepare({})

    def read(self, start: int, stop: int, out: Tensor, work: Workspace) -> None:
        """Fill `out` with the elements [start, stop) of the source."""
        work.scratch = self._scratch
        (source,) = self.step.inputs
        self.kernel.operands.read(source, start, stop, out, work)


@dataclass(frozen=True)
class Prepared(Operands):
    """Operands that may be results of other stages, read in any order.

    Attributes:
        run: Of the plan.
        stop: Ends the computing early.
        on_read: Called with the bytes that were read of inputs.
        ready: What was computed, by the id of the source.
    """

    run: RunState | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    on_read: Callable[[int], None] | None = None
    ready: dict[int, _Standing] = field(default_factory=dict)

    def read(self, source: Source, start: int, stop: int, out: Tensor, work: Workspace) -> None:
        """Fill `out`, (stop - start,), with the elements [start, stop) of a flattened source."""
        if self.run is None or not feeds(source):
            super().read(source, start, stop, out, work)
        else:
            self._standing(self.run, source).read(start, stop, out, work)

    def _standing(self, run: RunState, source: Source) -> _Standing:
        if id(source) not in self.ready:
            job = _Standing(run, sized(standing(source), None), f"found-{len(self.ready)}")
            Pool(run.plan.bill.workers, self.stop).run([starting(lambda: job)])
            if self.stop.is_set():
                raise InterruptedRun(2, hint="run the same command again to go on from here")
            self.ready[id(source)] = job
            self._count(once_bytes(source))
        return self.ready[id(source)]

    def _file(
        self, path: Path, at: int, dtype: str, span: tuple[int, int], out: Tensor, work: Workspace
    ) -> None:
        super()._file(path, at, dtype, span, out, work)
        self._count(nbytes(dtype, span[1] - span[0]))

    def _count(self, read_bytes: int) -> None:
        if self.on_read is not None:
            self.on_read(read_bytes)

    def close(self) -> None:
        """Give the scratch back."""
        for job in self.ready.values():
            job.clear()
        self.ready.clear()


def prepared(
    run: RunState, stop: threading.Event, on_read: Callable[[int], None] | None = None
) -> Prepared:
    """Return operands for what is found before the steps of a run.

    Args:
        on_read: Called with the bytes that were read of inputs.
    """
    kernel = Kernel(run.reader, found=run.found)
    return Prepared(run.reader, kernel.compute, run.found, run, stop, on_read)
