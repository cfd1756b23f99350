"""Decides which results of feeding stages are kept in scratch.

Those are kept that are read in other ways than slab by slab, once.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from merge_kit.core.tensors import nbytes
from merge_kit.plan.sources import Concat, Merged, Source, elements
from merge_kit.plan.values import Step
from merge_kit.plan.walk import operands, parts

_ALIGN = 4096


class Spills:
    """Places the spilled tensors below one step in its scratch file."""

    def __init__(self) -> None:
        self._next = 0
        self._placed: dict[int, Merged] = {}

    def place(self, step: Step) -> Step:
        """Return the step with every feeding result either placed or left to recomputing."""
        method = step.method
        assert method is not None  # copies have no feeding steps
        once = method.residency() == "element" and not method.scans()
        return replace(
            step,
            base=None if step.base is None else self._source(step.base, once=once),
            inputs=tuple(self._source(source, once=once) for source in step.inputs),
            aux=tuple((name, self._source(source, once=once)) for name, source in step.aux),
        )

    def _source(self, source: Source, *, once: bool) -> Source:
        if isinstance(source, Merged):
            return self._merged(source, once=once)
        if not parts(source):
            return source
        if isinstance(source, Concat):
            return replace(
                source, sources=tuple(self._source(s, once=False) for s in source.sources)
            )
        changed: dict[str, Any] = {}
        for entry in fields(source):
            value = getattr(source, entry.name)
            if isinstance(value, Source):
                changed[entry.name] = self._source(value, once=False)
        return replace(source, **changed)

    def _merged(self, source: Merged, *, once: bool) -> Merged:
        if id(source.step) in self._placed:
            return self._placed[id(source.step)]
        step = self.place(source.step)
        method = step.method
        assert method is not None
        found = replace(source, step=step)
        if not once or method.residency() != "element":
            found = replace(found, spill=self._next)
            size = nbytes(source.dtype, elements(source))
            self._next += -(-size // _ALIGN) * _ALIGN
        self._placed[id(source.step)] = found
        return found


def with_spills(step: Step) -> Step:
    """Return a step with the results that feed it placed; steps fed by files are unchanged."""
    if step.method is None or not any(_feeds(source) for source in operands(step)):
        return step
    return Spills().place(step)


def _feeds(source: Source) -> bool:
    return isinstance(source, Merged) or any(_feeds(part) for part in parts(source))
