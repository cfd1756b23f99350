"""Runs a plan into a folder."""

from __future__ import annotations

import re
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from merge_kit.core.hashing import tensor_hash
from merge_kit.engine.agreement import check_agreement
from merge_kit.engine.artefacts import find_artefacts, orders
from merge_kit.engine.jobs import CopyJob, MergeJob, Shared
from merge_kit.engine.opening import opened
from merge_kit.engine.pool import Pool, Task
from merge_kit.engine.progress import Progress
from merge_kit.engine.report import Report
from merge_kit.engine.state import RunState, Tally
from merge_kit.engine.whole_model import starting, whole_model
from merge_kit.engine.workspace import Workspace
from merge_kit.errors import InterruptedRun
from merge_kit.plan.values import Plan, Step


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
    finding_bytes = sum(one.read_bytes for one in plan.artefacts)
    tally = Tally(plan.bill.written_bytes + finding_bytes, on_progress)
    with opened(
        plan, folder, tally, allow_nonfinite=allow_nonfinite, kernel_copy=kernel_copy
    ) as run:
        for shard in plan.shards:
            run.writer.create(folder / shard.name, shard.nbytes, shard.header)
        resumed = _resume(run)
        left = [(i, step) for i, step in enumerate(plan.steps) if i not in resumed]
        if left:
            find_artefacts(run, stop)
        elif plan.artefacts:
            tally.moved(finding_bytes, plan.artefacts[-1].key)
        check_agreement(run.reader, [*plan.agreeing, *(step for _, step in left)])
        shared = whole_model(run, plan.whole_model, stop) if left else {}
        Pool(plan.bill.workers, stop).run(_tasks(run, left, shared))
        if stop.is_set():
            raise InterruptedRun(2, hint="run the same command again to go on from here")
        run.reader.check_all()
        if sync:
            run.writer.sync()
    targets = [target for step in plan.steps for target in step.outputs]
    return Report(
        seconds=time.monotonic() - started,
        bytes_read=plan.bill.read_bytes,
        bytes_written=plan.bill.written_bytes,
        peak_bytes=peak_bytes(),
        hashes={t.key: tally.hashes[t.key] for t in targets},
        nonfinite=dict(sorted(tally.nonfinite.items())),
        saturated=dict(sorted(tally.saturated.items())),
        resumed=len(resumed),
        facts={t.key: tally.facts[t.key] for t in targets if t.key in tally.facts},
        orders=orders(run),
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


def _tasks(run: RunState, left: list[tuple[int, Step]], shared: Shared) -> Iterator[Task]:
    for index, step in left:
        if step.action == "copy":
            yield starting(partial(CopyJob, run, index, step))
        else:
            yield starting(partial(MergeJob, run, index, step, shared))


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
            run.tally.facts.update(finished.facts)
            run.tally.nonfinite.update(finished.nonfinite)
            run.tally.saturated.update(finished.saturated)
            run.tally.moved(sum(t.spec.nbytes for t in targets), targets[-1].key)
    return done
