"""The memory of one worker while it runs a step, and the operations of its solves."""

from __future__ import annotations

from itertools import zip_longest
from math import prod
from typing import Any

from merge_kit.core.dtypes import DTYPES
from merge_kit.core.tensors import BLOCK, nbytes, numel
from merge_kit.methods.rounding import ODD_BYTES
from merge_kit.methods.updates import AdapterMethod, Work
from merge_kit.plan.residency import (
    PIECE,
    kept_bytes,
    projected_passes,
    raw_bytes,
    spare_bytes,
)
from merge_kit.plan.sources import LowRank, Projected, Source, elements
from merge_kit.plan.values import Step
from merge_kit.plan.walk import (
    feeding,
    is_whole_aux,
    merged_sources,
    operand_shape,
    operands,
    parts,
)

ALGEBRA_BYTES = 10_000_000
"""What products and decompositions add to the process: the code that they load."""

_ALGEBRA_BUFFERS = 2_000_000
"""What they take for themselves in each thread."""

_PROJECTED_BUFFERS = 8_000_000
"""What products of large matrices in float64 take."""

_YIELDED = 24
"""Bytes of an element of a factor that is yielded: in float64, and while it is rounded."""


def float_bytes(step: Step) -> int:
    """Return the bytes of one element of a slab over all models."""
    rows = len(step.inputs) + (step.base is not None) + len(step.aux) - len(_whole(step))
    return _width(step) * max(rows, 1)


def _whole(step: Step) -> list[Source]:
    """Return the further operands that are whole in every slab."""
    return [source for _, source in step.aux if is_whole_aux(step, source)]


def rows_bytes(step: Step) -> int:
    """Return the part of a step's peak that operands are read into: a worker keeps the longest."""
    if step.method is None:
        return 0
    return min(step.peak_bytes, _slab_count(step, step.slab_elements) * float_bytes(step))


def slab_bytes(step: Step, slab: int) -> int:
    """Return the memory of one worker for slabs of so many elements, feeding steps included."""
    return sum(_levels(step, slab, {})) + _kept_bytes(step)


def _kept_bytes(step: Step) -> int:
    """Return what readers keep from slab to slab, for the step and those that feed it."""
    steps = [step, *(source.step for source in merged_sources(step))]
    return sum(kept_bytes(s, _width(one)) for one in steps for s in operands(one))


def _width(step: Step) -> int:
    """Return the bytes of one element in the step's arithmetic."""
    return DTYPES[step.compute].bits // 8


def _levels(step: Step, slab: int, known: dict[int, list[int]]) -> list[int]:
    """Return that memory by depth: steps that feed one step share the buffers of the next depth."""
    if id(step) not in known:
        below = [_levels(source.step, slab, known) for source in feeding(step)]
        known[id(step)] = [
            _own_bytes(step, slab),
            *(max(level) for level in zip_longest(*below, fillvalue=0)),
        ]
    return known[id(step)]


def _own_bytes(step: Step, slab: int) -> int:
    """Return the memory of one worker for slabs of one step alone."""
    width = _width(step)
    if step.method is None:
        return _compared_bytes(step, slab, width) if step.base is not None else 4 * 8 * BLOCK
    count = _slab_count(step, slab)
    whole = [elements(source) for source in _whole(step)]
    longest = max(count, *whole, 0)
    outputs = (min(t.spec.nbytes, nbytes(t.spec.dtype, longest)) for t in step.outputs)
    raw = max((raw_bytes(source, longest) for source in operands(step)), default=0)
    spare = max((spare_bytes(source, longest, width) for source in operands(step)), default=0)
    own = count * float_bytes(step) + width * sum(whole) + raw + spare + _statistics_bytes(step)
    own += _algebra_buffers(step) + (ODD_BYTES if step.compute == "F64" else 0)
    if _factors(step):
        return own + _work(step).scratch_bytes + _YIELDED * sum(t.spec.numel for t in step.outputs)
    scratch = step.method.scratch_bytes(len(step.inputs), count + max(whole, default=0))
    return own + sum(outputs) + scratch


def _compared_bytes(step: Step, slab: int, width: int) -> int:
    """Return what a comparison of two operands holds, of bytes or slab by slab."""
    count, both = min(slab, PIECE), operands(step)
    raw = max(raw_bytes(source, count) for source in both)
    spare = max(spare_bytes(source, count, width) for source in both)
    return max(4 * 8 * BLOCK, 2 * width * count + raw + spare)


def _algebra_buffers(step: Step) -> int:
    if not multiplies(step):
        return 0
    projects = any(_has_products(s, Projected) for s in operands(step))
    return _PROJECTED_BUFFERS if projects else _ALGEBRA_BUFFERS


def multiplies(step: Step) -> bool:
    """Return whether a step, or one that feeds it, computes products of matrices."""
    steps = [step, *(source.step for source in merged_sources(step))]
    return any(_factors(one) or any(_has_products(s) for s in operands(one)) for one in steps)


def _has_products(source: Source, kinds: Any = LowRank | Projected) -> bool:
    return isinstance(source, kinds) or any(_has_products(part, kinds) for part in parts(source))


def _slab_count(step: Step, slab: int) -> int:
    """Return the elements of a slab."""
    assert step.method is not None
    grain, shape = step.method.residency(), operand_shape(step)
    if grain == "tensor":
        return numel(shape)
    count = min(slab, max(1, numel(shape)))
    return max(count, min(shape[-1] if shape else 1, numel(shape))) if grain == "row" else count


def _statistics_bytes(step: Step) -> int:
    assert step.method is not None
    scans, total = step.method.scans(), max(1, numel(operand_shape(step)))
    if not scans:
        return 0
    held = sum(scan.reduction.held_bytes(total) for scan in scans)
    return 8 * 3 * BLOCK * (len(step.inputs) + 1) + held


def _factors(step: Step) -> bool:
    """Return whether a step yields factors."""
    return step.shape is not None and isinstance(step.method, AdapterMethod)


def _work(step: Step) -> Work:
    """Return what the factoring of a step takes."""
    assert isinstance(step.method, AdapterMethod)
    assert step.shape is not None
    ranks = [source.shape[0] for name, source in step.aux if name.startswith("a")]
    made = [target.spec.shape[0] for target in step.outputs[::2]]
    return step.method.work((step.shape[0], prod(step.shape[1:])), ranks, made)


def flops(step: Step) -> float:
    """Return the operations of solves and decompositions of a step and of those that feed it."""
    return _own_flops(step) + sum(_own_flops(source.step) for source in merged_sources(step))


def _own_flops(step: Step) -> float:
    if step.method is None or step.action == "copy":
        return 0.0
    if _factors(step):
        return _work(step).flops
    spec = step.outputs[0].spec
    own = step.method.flops(step.outputs[0].key, spec.shape, len(step.inputs))
    return own + sum(_projected_flops(source) for source in operands(step))


def _projected_flops(source: Source) -> float:
    """Return the operations of projections in a source."""
    inside = sum(_projected_flops(part) for part in parts(source))
    if not isinstance(source, Projected):
        return inside
    (height, inner), (rows, columns) = source.source.shape, source.shape
    right = 0.0 if source.right is None else 2.0 * height * inner * columns
    if source.left is None:
        return inside + right
    return inside + projected_passes(source) * right + 2.0 * rows * height * columns
