"""Runs a plan into a folder."""

from __future__ import annotations

import re
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from merge_kit.core.hashing import tensor_hash
from merge_kit.engine.agreement import check_agreement
from merge_kit.engine.jobs import CopyJob, Job, MergeJob, ScanJob, Shared
from merge_kit.engine.journal import Journal
from merge_kit.engine.pool import Pool, Task
from merge_kit.engine.progress import Progress
from merge_kit.engine.report import Report
from merge_kit.engine.state import Room, RunState, Tally
from merge_kit.engine.statistics import InOrder, Passes, chunks, thinning
from merge_kit.engine.threads import one_torch_thread
from merge_kit.engine.workspace import Workspace
from merge_kit.errors import InterruptedRun
from merge_kit.io.reader import Reader
from merge_kit.io.writer import Writer
from merge_kit.plan.values import Plan, Step
from merge_kit.plan.whole_model import Group, groups, model_scans


def run_plan(
    plan: Plan,
    folder: Path,
    *,
    allow_nonfinite: bool = False,
    sync: bool = False,
    kernel_copy: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
) -> Report:
    """Write the shards of a plan into a folder, going on from where an earlier run stopped.

    Args:
        allow_nonfinite: Write NaN and infinities, and count them, instead of stopping.
        sync: Wait until everything is on disk.
        kernel_copy: Whether the kernel may copy what passes through.
        on_progress: Called from worker threads, one call at a time.
        stop: Set it to end the run early; what is finished is kept in the folder.

    Raises:
        NonFiniteError: If merged values are not finite and that is not allowed.
        CheckpointError: If an input cannot be read or changed since the plan was made.
        OutputError: If the disk or the system refuses a write.
        InterruptedRun: If `stop` was set.
    """
    started = time.monotonic()
    stop = stop or threading.Event()
    files = [file for model in plan.read for file in model.files]
    tally = Tally(plan.bill.written_bytes, on_progress)
    with (
        Reader(files) as reader,
        Writer(kernel_copy=kernel_copy) as writer,
        Journal(folder) as journal,
        one_torch_thread(),
        _open_files(len(files) + len(plan.shards)),
    ):
        room = Room(plan.bill.heavy_bytes)
        run = RunState(plan, folder, reader, writer, journal, tally, allow_nonfinite, room)
        for shard in plan.shards:
            writer.create(folder / shard.name, shard.nbytes, shard.header)
        resumed = _resume(run)
        left = [(i, step) for i, step in enumerate(plan.steps) if i not in resumed]
        check_agreement(reader, [*plan.agreeing, *(step for _, step in left)])
        shared = _whole_model(run, stop) if left else {}
        Pool(plan.bill.workers, stop).run(_tasks(run, left, shared))
        if stop.is_set():
            raise InterruptedRun(2, hint="run the same command again to go on from here")
        reader.check_all()
        if sync:
            writer.sync()
    return Report(
        seconds=time.monotonic() - started,
        bytes_read=plan.bill.read_bytes,
        bytes_written=plan.bill.written_bytes,
        peak_bytes=peak_bytes(),
        hashes={t.key: tally.hashes[t.key] for s in plan.steps for t in s.outputs},
        nonfinite=dict(sorted(tally.nonfinite.items())),
        saturated=dict(sorted(tally.saturated.items())),
        resumed=len(resumed),
    )


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far.

    Linux hands the peak of a parent on to getrusage of its child; VmHWM is the process's own.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii"))
        if found is not None:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def _open_files(count: int) -> Iterator[None]:
    """Let this process open so many files at once, where the system's hard limit allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft != resource.RLIM_INFINITY and wanted > soft:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _tasks(run: RunState, left: list[tuple[int, Step]], shared: Shared) -> Iterator[Task]:
    for index, step in left:
        if step.action == "copy":
            yield _starting(partial(CopyJob, run, index, step))
        else:
            yield _starting(partial(MergeJob, run, index, step, shared))


def _starting(make: Callable[[], Job]) -> Task:
    """Return a task that makes a job only when a worker has come to it."""

    def task(work: Workspace) -> Sequence[Task]:
        return make().begin(work)

    return task


def _resume(run: RunState) -> set[int]:
    """Return the steps that earlier runs finished and whose bytes are still what they wrote.

    Where an earlier run was allowed to write NaN and this one is not, the step is done again and
    says what is wrong.
    """
    done, work = set(), Workspace()
    for index, finished in run.journal.finished().items():
        is_refused = (finished.nonfinite or finished.saturated) and not run.allow_nonfinite
        if index >= len(run.plan.steps) or is_refused:
            continue
        targets = run.plan.steps[index].outputs
        found = {t.key: tensor_hash(run.read_back(t, work)) for t in targets}
        if found == finished.hashes:
            done.add(index)
            run.tally.hashes.update(finished.hashes)
            run.tally.nonfinite.update(finished.nonfinite)
            run.tally.saturated.update(finished.saturated)
            run.tally.moved(sum(t.spec.nbytes for t in targets), targets[-1].key)
    return done


def _whole_model(run: RunState, stop: threading.Event) -> Shared:
    """Return the statistics of scope "model" by group of steps, finished steps included."""
    shared: dict[Group, Mapping[str, Any]] = {}
    for group, members in groups(run.plan.whole_model).items():  # earlier stages first
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
            tasks.append(_starting(job))
            first += len(chunks(step, passes))
        Pool(run.plan.bill.workers, stop).run(tasks)
        if not stop.is_set():
            passes.finish(fold.total)
    return passes.results
