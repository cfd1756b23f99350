"""Opens what the jobs of a run share: files, journal, memory for whole tensors."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from merge_kit.engine.copies import Repeats
from merge_kit.engine.journal import Journal
from merge_kit.engine.state import Room, RunState, Tally
from merge_kit.engine.threads import one_torch_thread
from merge_kit.io.reader import Reader
from merge_kit.io.writer import Writer
from merge_kit.plan.values import Plan


@contextmanager
def opened(
    plan: Plan,
    folder: Path,
    tally: Tally,
    *,
    allow_nonfinite: bool,
    kernel_copy: bool = True,
    journal: str = "journal.jsonl",
) -> Iterator[RunState]:
    """Open a plan's inputs, a journal of this name in the folder, and a writer without files."""
    files = [file for model in plan.read for file in model.files]
    room = Room(plan.bill.heavy_bytes)
    with (
        Reader(files) as reader,
        Writer(kernel_copy=kernel_copy) as writer,
        Journal(folder, journal) as lines,
        one_torch_thread(),
        _open_files(len(files) + len(plan.shards)),
    ):
        repeats = Repeats(plan.steps)
        yield RunState(
            plan, folder, reader, writer, lines, tally, allow_nonfinite, room, repeats=repeats
        )


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
