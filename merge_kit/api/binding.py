"""A method's name and what a caller told it, checked, as a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from merge_kit.api.held import HeldModel
from merge_kit.api.nodes import as_node, grounded
from merge_kit.api.requests import Node, Request, refuse_twins
from merge_kit.core.names import nearest
from merge_kit.errors import UsageError
from merge_kit.methods import registry
from merge_kit.methods.registry import Parameter

if TYPE_CHECKING:
    from merge_kit.api.nodes import Operand


def bind(
    name: str,
    models: Sequence[Operand | Node],
    base: Operand | Node | None,
    seed: int | None,
    told: Mapping[str, Any],
) -> Request:
    """Return a merge of models by a method.

    Args:
        told: Parameters by the recipe's key or the field's name; None is "not given". For a
            parameter that each model may set, a list has one value a model, anything else is for
            all of them.

    Raises:
        PlanError: If there is no such method.
        UsageError: If a parameter is unknown, missing, or has not one value a model; or if the
            method needs a base and there is none.
    """
    kind, known = registry.find(name), _parameters(name)
    if kind.needs_base and base is None:
        hint = f"write {name}(base, [model, ...])"
        raise UsageError(f"{name} needs a base", hint=hint)
    if not models:
        hint = f"write {name}({_call(name)}, ...)"
        raise UsageError("found no models, expected at least one", where=name, hint=hint)
    given: dict[str, Any] = {}
    for key, value in told.items():
        parameter = _known(name, known, key)
        if value is not None and parameter.name in given:
            hint = f"pass {parameter.field}=... only"
            problem = f"found {parameter.name} twice, expected it once"
            raise UsageError(problem, where=name, hint=hint)
        if value is not None:
            given[parameter.name] = value if parameter.name == "statistics" else plain(value)
    for parameter in known.values():
        if parameter.name not in given and parameter.required:
            given[parameter.name] = _default(name, parameter)
    evidence: dict[str, HeldModel] = {}
    if kind.statistics_of:
        given["statistics"] = _statistics(given["statistics"], evidence)
    lists = {
        key: _one_a_model(name, key, value, len(models))
        for key, value in given.items()
        if known[key].per_model and isinstance(value, list | tuple)
    }
    nodes, start = tuple(map(as_node, models)), None if base is None else as_node(base)
    if kind.makes != "adapter":
        start = None if start is None else grounded(start, None, name)
        nodes = tuple(grounded(node, start, name) for node in nodes)
        refuse_twins(nodes, name)
    return Request(
        method=name,
        models=nodes,
        base=start,
        own=tuple(_row(lists, i) for i in range(len(models))) if lists else (),
        parameters={key: value for key, value in given.items() if key not in lists},
        seed=seed,
        evidence=evidence,
    )


def listed(name: str, found: object) -> Sequence[Any]:
    """Return models if they are a list of models.

    Raises:
        UsageError: If they are anything else.
    """
    if isinstance(found, str | bytes | Mapping) or not isinstance(found, Sequence):
        problem = f"found models of type {type(found).__name__}, expected a list"
        raise UsageError(problem, where=name, hint=f"write {name}({_call(name)}, ...)")
    return found


def _call(name: str) -> str:
    """Return how models are passed to a method's function."""
    kind = registry.find(name) if name in registry.names() else None
    if kind is None or kind.makes != "structure":
        return "[a, b]"
    return "model" if kind.max_inputs == 1 else "model, or [a, b]"


def default_of(parameter: Parameter) -> Any:
    """Return a parameter's default in the library; None where it has none.

    Weights that recipes must give are 1 here: every model counts alike.
    """
    if parameter.required and parameter.per_model and parameter.name == "weight":
        return 1.0
    return parameter.default


def _default(method: str, parameter: Parameter) -> Any:
    found = default_of(parameter)
    if found is None:
        raise UsageError(f"{method} needs {parameter.field}", hint=f"pass {parameter.field}=...")
    return found


def _statistics(value: Any, evidence: dict[str, HeldModel]) -> Any:
    """Return statistics as a recipe names them; those in memory are kept by their text."""
    rows = value if isinstance(value, list | tuple) else [value]
    texts = []
    for row in rows:
        if isinstance(row, str | PathLike):
            texts.append(fspath(row))
            continue
        held = row if isinstance(row, HeldModel) else HeldModel(row)
        if held.path is not None:
            texts.append(str(held.path))
        else:
            texts.append(f"statistics in memory {id(row):x}")
            evidence[texts[-1]] = held
    return texts if isinstance(value, list | tuple) else texts[0]


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


def plain(value: Any) -> Any:
    """Return numbers of numpy and torch, alone or in lists, as those of Python."""
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if hasattr(value, "tolist") and getattr(value, "ndim", 2) <= 1:
        return value.tolist()
    return value
