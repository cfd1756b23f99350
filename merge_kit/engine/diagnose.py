"""Finds where values that are not finite came from, once a run has stopped for them."""

from __future__ import annotations

import torch

from merge_kit.core.tensors import BLOCK
from merge_kit.engine.kernel import Kernel, NotFinite
from merge_kit.engine.statistics import slabs, step_elements
from merge_kit.engine.workspace import Workspace
from merge_kit.errors import NonFiniteError
from merge_kit.io.torch_dtypes import torch_dtype
from merge_kit.methods.rounding import nonfinite, round_into
from merge_kit.plan.sources import Source, elements
from merge_kit.plan.values import Step


def not_finite(kernel: Kernel, step: Step, work: Workspace) -> NonFiniteError:
    """Return an error that says how many values of which model and tensor are not finite."""
    inside = _inside(kernel, step, work)
    spans = slabs(step, (0, step_elements(step)))
    found = [f"{count} in {name}" for name, count in inside.items() if count]
    if found:
        problem = f"{sum(inside.values())} NaN or infinite values in the inputs: "
        problem += ", ".join(found)
        hint = "repair that model, or pass --allow-nonfinite to write them"
    else:
        problem = _made(kernel, step, spans, work)
        hint = "choose a wider dtype or smaller weights, or pass --allow-nonfinite to write them"
    return NonFiniteError(problem, where=step.outputs[0].key, hint=hint)


def _inside(kernel: Kernel, step: Step, work: Workspace) -> dict[str, int]:
    """Return how many values are not finite, by where they are."""
    sources: list[tuple[str, Source]] = []
    if step.base is not None:
        sources.append(("the base", step.base))
    if step.inputs:
        sources += zip(step.models, step.inputs, strict=True)
    if step.shape is not None:
        sources += [(_owner(step, name), source) for name, source in step.aux]
    inside = dict.fromkeys((name for name, _ in sources), 0)
    work.enter(step)
    for name, source in sources:
        total, size = elements(source), max(step.slab_elements, BLOCK)
        for start in range(0, total, size):
            stop = min(start + size, total)
            row = work.rows("diagnosis", 1, stop - start, torch_dtype(step.compute))[0]
            kernel.operands.read(source, start, stop, row, work)
            inside[name] += nonfinite(row)
    return inside


def _owner(step: Step, name: str) -> str:
    """Return the model that a factor is of: "a1" and "b1" are of the second."""
    number = name.lstrip("ab")
    known = number.isdecimal() and int(number) < len(step.models)
    return step.models[int(number)] if known else name


def _made(kernel: Kernel, step: Step, spans: list[tuple[int, int]], work: Workspace) -> str:
    """Return how many values overflow, in the merge or already in what is scanned for it."""
    if id(step) not in kernel.scans and step.method is not None and step.method.scans():
        return f"differences between the models are too large for {step.compute}"
    made = 0
    for start, stop in spans:
        try:
            merged = kernel.merge(step, kernel.load(step, start, stop, work))
        except NotFinite:
            return f"differences between the models are too large for {step.compute}"
        for values, target in zip(merged, step.outputs, strict=True):
            narrow = torch.empty(values.shape, dtype=torch_dtype(target.spec.dtype))
            round_into(values, narrow)
            made += nonfinite(narrow)
    dtype = step.outputs[0].spec.dtype
    return f"the merge makes {made} values that are NaN, infinite or too large for {dtype}"
