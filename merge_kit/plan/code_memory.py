"""What the code adds to the process that some steps load, once, however many workers there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from merge_kit.plan.sources import Generated, Source
from merge_kit.plan.step_memory import ALGEBRA_BYTES, multiplies
from merge_kit.plan.values import Step
from merge_kit.plan.walk import merged_sources, operands, parts

RANDOM_BYTES = 7_000_000
"""What drawing random numbers adds."""

WIDE_BYTES = 5_000_000
"""What arithmetic in float64 adds, that of statistics included."""


def code_bytes(steps: Sequence[Step]) -> int:
    """Return what the code of the steps, and of those that feed them, adds to the process."""
    algebra = any(multiplies(step) for step in steps)
    random = any(_draws(source) for step in steps for source in _read(step))
    wide = any(_is_wide(one) for step in steps for one in _computed(step))
    return ALGEBRA_BYTES * algebra + RANDOM_BYTES * random + WIDE_BYTES * wide


def _computed(step: Step) -> Iterator[Step]:
    for one in (step, *(source.step for source in merged_sources(step))):
        if one.action != "copy" and one.method is not None:
            yield one


def _is_wide(step: Step) -> bool:
    return step.compute == "F64" or (step.method is not None and bool(step.method.scans()))


def _read(step: Step) -> Iterator[Source]:
    for one in _computed(step):
        yield from operands(one)


def _draws(source: Source) -> bool:
    if isinstance(source, Generated):
        return source.kind in ("normal", "uniform")
    return any(_draws(part) for part in parts(source))
