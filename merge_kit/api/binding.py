"""A method's name and what a caller told it, checked, as a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from merge_kit.api.expressions import load
from merge_kit.api.lowering import Request
from merge_kit.core.names import nearest
from merge_kit.errors import UsageError
from merge_kit.methods import registry
from merge_kit.methods.registry import Parameter

if TYPE_CHECKING:
    from merge_kit.api.expressions import Operand


def bind(
    name: str,
    models: Sequence[Operand],
    base: Operand | None,
    seed: int,
    told: Mapping[str, Any],
) -> Request:
    """Return a merge of models by a method.

    Args:
        told: Parameters by the recipe's key or the field's name; None is "not given". For a
            parameter that each model may set, a list has one value a model, anything else is for
            all of them.

    Raises:
        PlanError: If there is no such method.
        UsageError: If a parameter is unknown, missing, or has not one value a model.
    """
    known = _parameters(name)
    if isinstance(models, str | bytes | Mapping) or not isinstance(models, Sequence):
        problem = f"found models of type {type(models).__name__}, expected a list"
        raise UsageError(problem, where=name, hint=f"write {name}([a, b], ...)")
    given = {_known(name, known, key).name: v for key, v in told.items() if v is not None}
    for parameter in known.values():
        if parameter.required and parameter.name not in given:
            hint = f"pass {parameter.field}=..."
            raise UsageError(f"{name} needs {parameter.field}", hint=hint)
    lists = {
        key: _one_a_model(name, key, value, len(models))
        for key, value in given.items()
        if known[key].per_model and isinstance(value, list | tuple)
    }
    loaded = tuple(load(model) for model in models)
    if len({model.key for model in loaded}) < len(loaded):
        problem = "the same model stands twice among the models"
        raise UsageError(problem, where=name, hint="pass it once, with the sum of the weights")
    return Request(
        method=name,
        models=loaded,
        base=None if base is None else load(base),
        own=tuple(_row(lists, i) for i in range(len(models))) if lists else (),
        parameters={key: value for key, value in given.items() if key not in lists},
        seed=seed,
    )


def _parameters(name: str) -> dict[str, Parameter]:
    return {p.name: p for p in registry.parameters(registry.find(name))}


def _known(method: str, known: Mapping[str, Parameter], key: str) -> Parameter:
    for parameter in known.values():
        if key in (parameter.name, parameter.field):
            return parameter
    fields = [parameter.field for parameter in known.values()]
    hint = nearest(key, fields) or "it has none"
    raise UsageError(f"{method} has no parameter {key!r}", hint=hint)


def _one_a_model(method: str, key: str, values: Sequence[Any], count: int) -> Sequence[Any]:
    if len(values) != count:
        problem = f"found {len(values)} values of {key} for {count} models"
        raise UsageError(problem, where=method, hint="give one value a model, or one for all")
    return values


def _row(lists: Mapping[str, Sequence[Any]], index: int) -> dict[str, Any]:
    return {key: values[index] for key, values in lists.items() if values[index] is not None}
