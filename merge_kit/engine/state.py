"""What all jobs of a run share: files, kernel, progress, what was found not finite."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from merge_kit.core.hashing import digests
from merge_kit.core.tensors import BLOCK, nbytes
from merge_kit.engine.copies import Repeats
from merge_kit.engine.journal import Journal
from merge_kit.engine.kernel import NotFinite
from merge_kit.engine.progress import Progress
from merge_kit.engine.workspace import Workspace
from merge_kit.io.reader import Reader
from merge_kit.io.torch_dtypes import torch_dtype
from merge_kit.io.writer import Writer
from merge_kit.methods.rounding import nonfinite, round_into
from merge_kit.plan.values import Plan, Target


@dataclass
class Tally:
    """Counts of one run, under a lock."""

    total_bytes: int
    on_progress: Callable[[Progress], None] | None
    started: float = field(default_factory=time.monotonic)
    done_bytes: int = 0
    nonfinite: dict[str, int] = field(default_factory=dict)
    saturated: dict[str, int] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Mapping[str, float]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def moved(self, count: int, tensor: str) -> None:
        """Count bytes done, and tell who listens."""
        with self.lock:
            self.done_bytes += count
            if self.on_progress is not None:
                seconds = time.monotonic() - self.started
                event = Progress(self.done_bytes, self.total_bytes, seconds, tensor)
                self.on_progress(event)


class Room:
    """Memory that whole tensors share; one that needs more than there is waits to be alone."""

    def __init__(self, total_bytes: int) -> None:
        self._total, self._used = total_bytes, 0
        self._turn = threading.Condition()

    @contextmanager
    def take(self, count: int) -> Iterator[None]:
        """Wait until so many bytes are free, and hold them."""
        with self._turn:
            self._turn.wait_for(lambda: not self._used or self._used + count <= self._total)
            self._used += count
        try:
            yield
        finally:
            with self._turn:
                self._used -= count
                self._turn.notify_all()


@dataclass(frozen=True)
class RunState:
    """What the jobs of one run share.

    Attributes:
        found: What was found before the run, by the artefact's key.
        repeats: What is known of bytes that are copied to several places.
    """

    plan: Plan
    folder: Path
    reader: Reader
    writer: Writer
    journal: Journal
    tally: Tally
    allow_nonfinite: bool
    heavy: Room
    found: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    repeats: Repeats = field(default_factory=Repeats)

    def path(self, target: Target) -> Path:
        """Return the file that holds an output tensor."""
        return self.folder / self.plan.shards[target.shard].name

    def emit(self, target: Target, start: int, merged: Tensor, work: Workspace) -> bytes:
        """Round, check and write a run of elements; return its digests if it starts at a block."""
        dtype = target.spec.dtype
        size = nbytes(dtype, merged.numel())
        raw, memory = work.bytes("out", size)
        rounded = raw.view(torch_dtype(dtype))
        round_into(merged, rounded)
        total = float(rounded.sum())
        if total - total != 0:  # NaN or infinite: perhaps only the sum
            self._count(target, merged, rounded)
        self.writer.write(self.path(target), target.offset + nbytes(dtype, start), memory)
        self.tally.moved(size, target.key)
        return digests(memory, dtype) if start % BLOCK == 0 else b""

    def _count(self, target: Target, merged: Tensor, rounded: Tensor) -> None:
        bad, before = nonfinite(rounded), nonfinite(merged)
        if bad and not self.allow_nonfinite:
            raise NotFinite
        with self.tally.lock:
            for counts, found in (
                (self.tally.nonfinite, before),
                (self.tally.saturated, bad - before),
            ):
                if found:
                    counts[target.key] = counts.get(target.key, 0) + found

    def read_back(self, target: Target, work: Workspace) -> bytes:
        """Return the joined digests of what a target's bytes are now."""
        spec, found = target.spec, []
        step = 16 * nbytes(spec.dtype, BLOCK)
        for at in range(0, spec.nbytes, step):
            _, memory = work.bytes("out", min(step, spec.nbytes - at))
            self.writer.read_back(self.path(target), target.offset + at, memory)
            found.append(digests(memory, spec.dtype))
        return b"".join(found)
