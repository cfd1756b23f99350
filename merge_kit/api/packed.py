"""Models whose weights are packed integers beside their scales: no numbers to merge."""

from __future__ import annotations

from merge_kit.architecture.quantised import quantisation_problem
from merge_kit.plan.models import Model

_SCALES = ("scale", "absmax", "SCB", "quant_state", "quant_map")
_PACKED = ("I32", "U32", "I8", "U8")


def packing_problem(model: Model) -> str | None:
    """Return a sentence that says how a model is quantised, None if it is not.

    What config.json says comes first. Without it, a tensor of integers counts as packed if the
    same module has scales: `fc.qweight` beside `fc.scales`, `fc.weight` beside `fc.weight.absmax`.
    """
    if model.config is not None:
        problem = quantisation_problem(model.config, {s.dtype for s in model.specs.values()})
        if problem is not None:
            return problem
    modules = {
        name[: -len(last) - 1].removesuffix(".weight"): name
        for name in model.specs
        if any(word in (last := name.rpartition(".")[2]) for word in _SCALES)
    }
    for name, spec in model.specs.items():
        module, _, last = name.rpartition(".")
        beside = modules.get(module)
        if spec.dtype in _PACKED and "weight" in last and beside is not None:
            return f"{name} holds packed weights ({spec.dtype}), numbers that need {beside}"
    return None
