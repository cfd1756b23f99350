"""Any method on tensors of one shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from merge_kit.api.binding import bind, listed
from merge_kit.api.held import HeldModel
from merge_kit.api.lowering import lower
from merge_kit.api.mergeable import state_dict
from merge_kit.errors import UsageError
from merge_kit.methods import registry
from merge_kit.plan.cost import worker_count

if TYPE_CHECKING:
    from torch import Tensor


def merge_tensors(
    name: str,
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None = None,
    weights: float | Sequence[float] | None = None,
    seed: int = 0,
    tensor_name: str = "tensor",
    **parameters: Any,
) -> Tensor:
    """Merge tensors of one shape by a method: the bits that a merge of files gives.

    Arithmetic is float32, or float64 where an input is; the result is rounded once, to the
    narrowest float dtype that holds all inputs.

    Args:
        name: The method's, for example "slerp".
        tensors: One a model. Where the method needs a base and none is given, the first of them
            is the base, and the others are the models.
        base: The base model's tensor; pass the same object among `tensors` if it is a model too.
        weights: The parameter `weight`: one a model (the base is none), or one for all; 1 if it
            is not given.
        seed: Of everything random.
        tensor_name: Name of the tensor, on which everything random depends too.
        parameters: Of the method; lists have one value a model. Statistics that a method weighs
            models by are tensors too.

    Raises:
        PlanError: If there is no such method.
        MergeKitError: If parameters or tensors are not what the method takes.
    """
    if registry.find(name).makes == "structure":
        hint = f"write {name}(model, ...) with a path or a state dict"
        raise UsageError(f"{name} builds models, and merges no tensors", hint=hint)
    if registry.find(name).makes == "adapter":
        hint = f"write {name}([a, b], ...) with the paths of adapters"
        raise UsageError(f"{name} makes adapters, and no tensors", hint=hint)
    if weights is not None:
        if "weight" in parameters:
            raise UsageError("found weight and weights, expected one of them", where=name)
        parameters["weight"] = weights
    rows = list(listed(name, tensors))
    if base is None and rows and registry.find(name).needs_base:
        base, *rows = rows
    if "statistics" in parameters:
        told = parameters["statistics"]
        parameters["statistics"] = [_named(tensor_name, one) for one in listed(name, told)]
    models = [{tensor_name: tensor} for tensor in rows]
    same = (model for model in models if model[tensor_name] is base)
    base_model = None if base is None else next(same, {tensor_name: base})
    lowered = lower(bind(name, models, base_model, seed, parameters))
    (merged,) = state_dict(lowered, workers=worker_count(None), allow_nonfinite=False).values()
    return merged


def _named(name: str, statistics: Any) -> Any:
    """Return a tensor of statistics as a model that holds it; what has names stays."""
    has_names = isinstance(statistics, str | PathLike | Mapping | HeldModel)
    return statistics if has_names else {name: statistics}
