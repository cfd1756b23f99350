"""Operands of what is found before a run: results of other stages are computed first."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from merge_kit.core.tensors import TensorSpec
from merge_kit.engine.jobs import Job, Phase
from merge_kit.engine.kernel import Kernel
from merge_kit.engine.operands import Operands
from merge_kit.engine.pool import Pool
from merge_kit.engine.state import RunState
from merge_kit.engine.whole_model import starting
from merge_kit.engine.workspace import Workspace
from merge_kit.errors import InterruptedRun
from merge_kit.methods.base import Grain
from merge_kit.methods.passthrough import Passthrough
from merge_kit.plan.cost import sized
from merge_kit.plan.sources import Source
from merge_kit.plan.spilling import feeds, with_spills
from merge_kit.plan.values import Step, Target


class _Whole(Passthrough):
    """Takes a tensor whole, so that what feeds it is computed once and kept in scratch."""

    def residency(self) -> Grain:
        return "tensor"


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
        ready: What was computed, by the id of the source.
    """

    run: RunState | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    ready: dict[int, _Standing] = field(default_factory=dict)

    def read(self, source: Source, start: int, stop: int, out: Tensor, work: Workspace) -> None:
        """Fill `out`, (stop - start,), with the elements [start, stop) of a flattened source."""
        if self.run is None or not feeds(source):
            super().read(source, start, stop, out, work)
        else:
            self._standing(self.run, source).read(start, stop, out, work)

    def _standing(self, run: RunState, source: Source) -> _Standing:
        if id(source) not in self.ready:
            job = _Standing(run, _step(source), f"found-{len(self.ready)}")
            Pool(run.plan.bill.workers, self.stop).run([starting(lambda: job)])
            if self.stop.is_set():
                raise InterruptedRun(2, hint="run the same command again to go on from here")
            self.ready[id(source)] = job
        return self.ready[id(source)]

    def close(self) -> None:
        """Give the scratch back."""
        for job in self.ready.values():
            job.clear()
        self.ready.clear()


def prepared(run: RunState, stop: threading.Event) -> Prepared:
    """Return operands for what is found before the steps of a run."""
    kernel = Kernel(run.reader, found=run.found)
    return Prepared(run.reader, kernel.compute, run.found, run, stop)


def _step(source: Source) -> Step:
    """Return a step that reads a source whole."""
    spec = TensorSpec("found", "F64" if source.dtype == "F64" else "F32", source.shape)
    step = Step(
        action="merge",
        outputs=(Target("found", spec, -1, 0),),
        inputs=(source,),
        models=("found",),
        method=_Whole(),
        weights=(1.0,),
        compute="F64" if source.dtype == "F64" else "F32",
    )
    return sized(with_spills(step), None)
