"""Runs the passes of statistics over whole models, and starts jobs on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from merge_kit.engine.jobs import Job, ScanJob, Shared
from merge_kit.engine.pool import Pool, Task
from merge_kit.engine.state import RunState
from merge_kit.engine.statistics import InOrder, Passes, chunks, thinning
from merge_kit.engine.workspace import Workspace
from merge_kit.plan.values import Step
from merge_kit.plan.whole_model import Group, groups, model_scans


def starting(make: Callable[[], Job]) -> Task:
    """Return a task that makes a job only when a worker has come to it."""

    def task(work: Workspace) -> Sequence[Task]:
        return make().begin(work)

    return task


def whole_model(run: RunState, steps: Sequence[Step], stop: threading.Event) -> Shared:
    """Return the statistics of scope "model" by group of steps, finished steps included."""
    shared: dict[Group, Mapping[str, Any]] = {}
    for group, members in groups(steps).items():  # earlier stages first
        shared[group] = _gather_group(run, members, shared, stop)
    return shared


def _gather_group(
    run: RunState, steps: list[Step], shared: Shared, stop: threading.Event
) -> Mapping[str, Any]:
    passes = Passes(model_scans(steps[0]), {}, thinning(steps))
    while passes.due() and not stop.is_set():
        fold, first, tasks = InOrder(), 0, []
        for i, step in enumerate(steps):
            job = partial(ScanJob, run, step, f"scan-{i}", shared, passes, fold, first)
            tasks.append(starting(job))
            first += len(chunks(step, passes))
        Pool(run.plan.bill.workers, stop).run(tasks)
        if not stop.is_set():
            passes.finish(fold.total)
    return passes.results
