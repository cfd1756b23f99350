"""Finds where values that are not finite came from, once a run has stopped for them."""

from __future__ import annotations

import torch

from merge_kit.engine.kernel import Kernel, NotFinite
from merge_kit.engine.rounding import nonfinite, round_into
from merge_kit.engine.statistics import slabs, step_elements
from merge_kit.engine.workspace import Workspace
from merge_kit.errors import NonFiniteError
from merge_kit.io.torch_dtypes import torch_dtype
from merge_kit.plan.values import Step


def not_finite(kernel: Kernel, step: Step, work: Workspace) -> NonFiniteError:
    """Return an error that says how many values of which model and tensor are not finite."""
    sources = [("the base", step.base)] if step.base is not None else []
    named = [*sources, *zip(step.models, step.inputs, strict=True)]
    inside = dict.fromkeys((name for name, _ in named), 0)
    spans = slabs(step, (0, step_elements(step)))
    for start, stop in spans:
        for name, source in named:
            assert source is not None
            row = work.rows("diagnosis", 1, stop - start, torch_dtype(step.compute))[0]
            kernel.operands.read(source, start, stop, row, work)
            inside[name] += nonfinite(row)
    found = [f"{count} in {name}" for name, count in inside.items() if count]
    if found:
        problem = f"{sum(inside.values())} NaN or infinite values in the inputs: "
        problem += ", ".join(found)
        hint = "repair that model, or pass --allow-nonfinite to write them"
    else:
        problem = _made(kernel, step, spans, work)
        hint = "choose a wider dtype or smaller weights, or pass --allow-nonfinite to write them"
    return NonFiniteError(problem, where=step.outputs[0].key, hint=hint)


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
