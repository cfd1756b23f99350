"""Runs steps of several outputs, and steps that others feed, with results handed over as tensors.

The arithmetic is that of `run_plan`: a result that feeds a step is rounded as its stage says, and
stands in memory where a run on disk spills it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from merge_kit.engine.in_memory import Shared, merged_whole, run_tasks, scanned, whole_model
from merge_kit.engine.kernel import Kernel
from merge_kit.engine.pool import Task
from merge_kit.engine.threads import one_torch_thread
from merge_kit.engine.workspace import Workspace
from merge_kit.io.reader import Reader
from merge_kit.io.values import WeightFile
from merge_kit.plan.sources import Memory, Merged, Source
from merge_kit.plan.values import Step, Target
from merge_kit.plan.walk import merged_sources, with_parts
from merge_kit.plan.whole_model import group_of, model_scans

Facts = Mapping[str, Mapping[str, float]]


def merge_outputs(
    steps: Sequence[Step],
    files: Iterable[WeightFile],
    emit: Callable[[Target, Tensor], None],
    *,
    workers: int,
    allow_nonfinite: bool = False,
) -> Facts:
    """Merge steps, hand over each output, rounded, in its shape, and return `Report.facts`.

    Args:
        steps: With slab sizes; those that feed them read files or memory alone where they rank a
            whole model.
        files: The files that are read, as they were when the steps were planned.
        emit: Called from worker threads, for the outputs of one step in their order.

    Raises:
        NonFiniteError: If merged values are not finite and that is not allowed.
        CheckpointError: If a file cannot be read or has changed.
    """
    found: dict[str, Mapping[str, float]] = {}
    lock = threading.Lock()
    with Reader(files) as reader, one_torch_thread():
        ranked = [source.step for step in steps for source in merged_sources(step)]
        ranked = [step for step in (*ranked, *steps) if model_scans(step)]
        shared = whole_model(reader, ranked, workers, lax=allow_nonfinite)

        def task(step: Step) -> Task:
            def run(work: Workspace) -> Sequence[Task]:
                one = _Stages(reader, shared, work, allow_nonfinite=allow_nonfinite)
                tensors, facts = one.results(step)
                for target, tensor in zip(step.outputs, tensors, strict=True):
                    emit(target, tensor)
                with lock:
                    found.update(facts)
                return ()

            return run

        run_tasks([task(step) for step in steps], workers)
        reader.check_all()
    keys = [target.key for step in steps for target in step.outputs]
    return {key: found[key] for key in keys if key in found}


class _Stages:
    """One step, after those that feed it."""

    def __init__(
        self, reader: Reader, shared: Shared, work: Workspace, *, allow_nonfinite: bool
    ) -> None:
        self._reader, self._shared, self._work = reader, shared, work
        self._allow_nonfinite = allow_nonfinite
        self._done: dict[int, Memory] = {}

    def results(self, step: Step) -> tuple[list[Tensor], Facts]:
        """Return the outputs of a step and what is worth knowing about them."""
        kernel = Kernel(self._reader, allow_nonfinite=self._allow_nonfinite)
        ready = replace(
            step,
            base=None if step.base is None else self._ready(step.base),
            inputs=tuple(self._ready(source) for source in step.inputs),
            aux=tuple((name, self._ready(source)) for name, source in step.aux),
        )
        known = self._shared.get(group_of(step), {})
        kernel.scans[id(ready)] = scanned(kernel, ready, known, self._work)
        lax = self._allow_nonfinite
        tensors = merged_whole(kernel, ready, self._work, allow_nonfinite=lax)
        return tensors, kernel.facts_by_key(ready)

    def _ready(self, source: Source) -> Source:
        """Return a source whose feeding steps stand in memory."""
        if not isinstance(source, Merged):
            return with_parts(source, self._ready)
        key = id(source.step)
        if key not in self._done:
            (target,) = source.step.outputs
            spec = replace(target.spec, dtype=source.dtype, shape=source.shape)
            rounded = replace(source.step, outputs=(replace(target, spec=spec),))
            (tensor,), _ = self.results(rounded)
            self._done[key] = Memory(tensor.flatten(), source.dtype, source.shape)
        return self._done[key]
