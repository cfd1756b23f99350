"""Gathers the scans of a step: passes over chunks, absorbed in order."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from merge_kit.core.tensors import BLOCK, numel
from merge_kit.engine.kernel import Kernel
from merge_kit.engine.workspace import Workspace
from merge_kit.methods.base import Grain, Scan
from merge_kit.methods.reductions import CHUNK, Accumulator, Done, Place
from merge_kit.plan.values import Step
from merge_kit.plan.walk import operand_shape

Gathered = dict[str, Accumulator]

SAMPLE = 4096
"""Elements of one run of a sample of a tensor."""

MOST_RUNS = 8192
"""Runs of a sample of a whole model, about."""


def ranges(step: Step, size: int) -> list[tuple[int, int]]:
    """Return the runs of elements that cover a step, `size` each, whole rows where rows matter."""
    total = step_elements(step)
    assert step.method is not None
    grain = step.method.residency()
    if grain == "tensor" or total == 0:
        return [(0, total)]
    if grain == "row":
        columns = row_elements(step)
        size = max(1, size // columns) * columns
    return [(at, min(at + size, total)) for at in range(0, total, size)]


def step_elements(step: Step) -> int:
    """Return the elements that a step reads of each operand."""
    return numel(operand_shape(step))


def row_elements(step: Step) -> int:
    """Return the elements of one row, at least 1."""
    shape = step.outputs[0].spec.shape
    return max(1, shape[-1] if shape else 1)


class InOrder:
    """Absorbs what parts gathered in the order of their indices, as soon as it can."""

    def __init__(self) -> None:
        self.total: Gathered = {}
        self._waiting: dict[int, Gathered] = {}
        self._next = 0
        self._lock = threading.Lock()

    def put(self, index: int, part: Gathered) -> None:
        """Take in what part `index` gathered."""
        with self._lock:
            self._waiting[index] = part
            while self._next in self._waiting:
                self._absorb(self._waiting.pop(self._next))
                self._next += 1

    def _absorb(self, part: Gathered) -> None:
        for name, accumulator in part.items():
            if name in self.total:
                self.total[name].absorb(accumulator)
            else:
                self.total[name] = accumulator


class Passes:
    """The passes that a list of scans takes, and the results so far.

    Args:
        scans: Scans whose `uses` are among them or among `known`.
        known: Results that are there already.
        thinning: How thin samples are, see `samples`.
    """

    def __init__(self, scans: Sequence[Scan], known: Mapping[str, Any], thinning: int = 0) -> None:
        self.thinning = thinning
        self.results: dict[str, Any] = dict(known)
        self._carry: dict[str, Any] = {}
        self._left = list(scans)

    def due(self) -> list[Scan]:
        """Return the scans of the next pass; none when all are done. Samples go first."""
        ready = [s for s in self._left if all(name in self.results for name in s.uses)]
        return [s for s in ready if s.reduction.samples(self.carry(s))] or ready

    @property
    def sampling(self) -> bool:
        """Whether the next pass looks at samples only."""
        return any(s.reduction.samples(self.carry(s)) for s in self.due())

    def carry(self, scan: Scan) -> Any:
        """Return what this pass of a scan starts from."""
        return self._carry.get(scan.name)

    def finish(self, totals: Gathered) -> None:
        """Take in the totals of one pass."""
        for scan in self.due():
            outcome = scan.reduction.finish(totals[scan.name], self.carry(scan))
            if isinstance(outcome, Done):
                self.results[scan.name] = outcome.result
                self._left.remove(scan)
            else:
                self._carry[scan.name] = outcome.carry


def gather(
    kernel: Kernel, step: Step, passes: Passes, span: tuple[int, int], work: Workspace
) -> Gathered:
    """Run one pass over one chunk of a step and return what each due scan gathered.

    Raises:
        NotFinite: If an operand holds NaN or infinity, unless the kernel lets them pass.
    """
    due, sampling = passes.due(), passes.sampling
    gathered = {s.name: s.reduction.accumulator(passes.carry(s)) for s in due}
    assert step.method is not None
    views = {scan.name: scan.of for scan in step.method.scans()}  # a group's steps have their own
    name, elements = step.outputs[0].key, step_elements(step)
    spans = samples(step, span, passes.thinning) if sampling else [span]
    for start, stop in (slab for one in spans for slab in slabs(step, one, scanning=True)):
        place = Place(name, start, elements)
        wanting = [s for s in due if gathered[s.name].wants(name, start, stop)]
        for scan in due if not wanting else ():
            gathered[scan.name].skip(place)
        if not wanting:
            continue
        slab = kernel.load(step, start, stop, work)
        kernel.check_finite(step, slab)
        for scan in due:
            view = views[scan.name]
            values = slab.tensors if view is None else view(slab, passes.results)
            gathered[scan.name].add(values, place)
    return gathered


def samples(step: Step, span: tuple[int, int], thinning: int = 0) -> list[tuple[int, int]]:
    """Return runs that stand for all elements of a span: all of it if it is small.

    They are the same for every slab size, spread evenly, at changing places of their stretch so
    that they meet all columns.

    Args:
        thinning: For a sample of a whole model, blocks that one short run stands for; 0 for a
            sample of one tensor.
    """
    start, stop = span
    total = stop - start
    assert step.method is not None
    grain = step.method.residency()
    unit = row_elements(step) if grain == "row" else 1
    length = SAMPLE // 8 if thinning else SAMPLE
    run = max(1, length // unit) * unit
    if total <= (run if thinning else 16 * SAMPLE) or grain == "tensor":
        return [span]
    if thinning:
        count = -(-total // (thinning * BLOCK))
    else:
        count = min(max(16, total // (32 * BLOCK)), 200, total // (2 * run))
        if count < 8:
            return [span]
    stretch = total // count // unit * unit
    room = (stretch - run) // unit + 1
    firsts = (start + i * stretch + i * 40_503 % room * unit for i in range(count))
    return [(first, first + run) for first in firsts]


def slabs(step: Step, span: tuple[int, int], *, scanning: bool = False) -> list[tuple[int, int]]:
    """Return the slabs of a run of elements.

    Rows do not start at blocks, so scans of row grain go by slabs of one fixed size.
    """
    start, stop = span
    assert step.method is not None
    grain: Grain = step.method.residency()
    if grain == "tensor" or start == stop:
        return [span]
    size = step.slab_elements
    if grain == "row":
        columns = row_elements(step)
        size = max(1, (BLOCK if scanning else size) // columns) * columns
    return [(at, min(at + size, stop)) for at in range(start, stop, size)]


def thinning(steps: Sequence[Step]) -> int:
    """Return the blocks that one run of a sample of these steps together stands for."""
    return 4 + sum(step_elements(step) for step in steps) // (MOST_RUNS * BLOCK)


def chunks(step: Step, passes: Passes) -> list[tuple[int, int]]:
    """Return the chunks in which a step is scanned, the same for every slab size."""
    return [(0, step_elements(step))] if passes.sampling else ranges(step, CHUNK)
