"""Decides which results of feeding stages are kept in scratch.

Those are kept that are read in other ways than slab by slab, once.
"""

from __future__ import annotations

from dataclasses import replace

from merge_kit.core.tensors import nbytes
from merge_kit.plan.sources import Chosen, Merged, Source, elements
from merge_kit.plan.values import Step
from merge_kit.plan.walk import operands, parts, with_parts

_ALIGN = 4096


class Spills:
    """Places the spilled tensors below one step in its scratch file."""

    def __init__(self, step: Step) -> None:
        self._next = 0
        self._placed: dict[int, Merged] = {}
        self._kept: set[int] = set()
        self._choose(step, set())

    def _choose(self, step: Step, seen: set[int]) -> None:
        """Find the feeding steps to keep: one reader that needs it is enough for all."""
        method = step.method  # None where operands are compared: each slab of them is read once
        once = method is None or (method.residency() == "element" and not method.scans())
        for source in operands(step):
            self._choose_source(source, seen, once=once)

    def _choose_source(self, source: Source, seen: set[int], *, once: bool) -> None:
        for part in parts(source):  # of several that could be chosen, one is read, as the choice is
            self._choose_source(part, seen, once=once and isinstance(source, Chosen))
        if not isinstance(source, Merged):
            return
        method, key = source.step.method, id(source.step)
        assert method is not None
        if not once or method.residency() != "element":
            self._kept.add(key)
        if key not in seen:
            seen.add(key)
            self._choose(source.step, seen)

    def place(self, step: Step) -> Step:
        """Return the step with every feeding result either placed or left to recomputing."""
        return replace(
            step,
            base=None if step.base is None else self._source(step.base),
            inputs=tuple(self._source(source) for source in step.inputs),
            aux=tuple((name, self._source(source)) for name, source in step.aux),
        )

    def _source(self, source: Source) -> Source:
        if isinstance(source, Merged):
            return self._merged(source)
        return with_parts(source, self._source)

    def _merged(self, source: Merged) -> Merged:
        key = id(source.step)
        if key in self._placed:
            return self._placed[key]
        found = replace(source, step=self.place(source.step))
        if key in self._kept:
            found = replace(found, spill=self._next)
            size = nbytes(source.dtype, elements(source))
            self._next += -(-size // _ALIGN) * _ALIGN
        self._placed[key] = found
        return found


def with_spills(step: Step) -> Step:
    """Return a step with the results that feed it placed; steps fed by files are unchanged."""
    if not any(feeds(source) for source in operands(step)):
        return step
    return Spills(step).place(step)


def feeds(source: Source) -> bool:
    """Return whether a source is the result of another stage, or made of one."""
    return isinstance(source, Merged) or any(feeds(part) for part in parts(source))
