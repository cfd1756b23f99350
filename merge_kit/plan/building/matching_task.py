"""The task of finding in which order a model's experts fit those of another one best."""

from __future__ import annotations

from dataclasses import dataclass

from merge_kit.plan.cost import once_bytes
from merge_kit.plan.residency import kept_bytes, raw_bytes, spare_bytes
from merge_kit.plan.sources import Source
from merge_kit.plan.values import Artefact

ORDER = "order"
"""Name of what is found: for each expert of the reference, the number of the one that fits it."""

DISTANCE = "distance"
"""Name of what is found beside: |r - m| / |r| for each of those pairs."""

SOLVER_BYTES = 48_000_000
"""What the code of the linear assignment takes; it stays for the run."""

_BUFFER_BYTES = 8 << 20  # less is slower for calls, more for the cache
_LEAST = 1024


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a run of elements begins in a flattened source."""

    source: Source
    start: int


@dataclass(frozen=True, slots=True)
class Compared:
    """What is compared of each expert.

    Attributes:
        size: Elements of one expert.
        reference: Where they are, for each expert of the reference.
        model: The same of the model.
    """

    size: int
    reference: tuple[Slot, ...]
    model: tuple[Slot, ...]


@dataclass(frozen=True, slots=True)
class ExpertMatching:
    """Experts of one block that are to be matched.

    Attributes:
        where: Model and module, for messages.
        count: Experts on both sides.
    """

    where: str
    count: int
    parts: tuple[Compared, ...]

    @property
    def longest(self) -> int:
        """Most elements of each expert that are held at once; it decides how sums round."""
        run = _LEAST
        while 2 * run * self.count * 16 <= _BUFFER_BYTES:
            run *= 2
        return max(1, min(run, max(part.size for part in self.parts)))


def matching(key: str, task: ExpertMatching, *, first: bool) -> Artefact:
    """Return a task with its bill.

    Args:
        first: Whether it is the first of the stage, which brings the code of the solver.
    """
    count, run = task.count, task.longest
    slots = [slot for part in task.parts for slot in (*part.reference, *part.model)]
    sources = list({id(slot.source): slot.source for slot in slots}.values())
    read = max(kept_bytes(s, 8) + spare_bytes(s, run, 8) + raw_bytes(s, run) for s in sources)
    found = 16 * count
    return Artefact(
        key,
        task,
        peak_bytes=8 * (2 * count + 2) * run + 8 * 4 * count * count + read,
        kept_bytes=found + (SOLVER_BYTES if first else 0),
        read_bytes=sum(map(once_bytes, sources)),
        flops=2.0 * count * count * sum(part.size for part in task.parts),
    )
