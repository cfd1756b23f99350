"""The parameters of a method that builds a model: one value each, no depth and no filters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from merge_kit.errors import ParameterError, RecipeError
from merge_kit.methods.base import PerModel
from merge_kit.methods.registry import Parameter, find, parameters
from merge_kit.methods.structures import Listed, StructureMethod
from merge_kit.recipe.lookup import coerce
from merge_kit.recipe.values import Entry, Mark, Parameters, Scalar, Setting, Stage


def structure_method(stage: Stage, entries: Sequence[Entry] | None = None) -> StructureMethod:
    """Return a stage's method with its parameters.

    Args:
        stage: The stage.
        entries: Whose own parameters count, in their order; the stage's models by default.

    Raises:
        RecipeError: If a value is missing, of the wrong type, or out of range.
    """
    kind = find(stage.merge_method)
    assert issubclass(kind, StructureMethod)  # what builds is registered as such
    models = stage.models if entries is None else entries
    marks: dict[str, Mark] = {}
    single = [p for p in parameters(kind) if p.name not in kind.spans_layers]
    values = {p.field: _value(p, stage, models, marks) for p in single}
    try:
        return kind(**values)
    except ParameterError as error:
        spoken = next((marks[name] for name in marks if name in error.hint), stage.mark)
        where = marks.get(error.parameter, spoken)  # `experts_per_token` may be left out
        hint = error.hint or f"see `mergekit methods {stage.merge_method}`"
        raise RecipeError(error.problem, where=str(where), hint=hint) from error


def place_of(stage: Stage, parameter: str) -> str:
    """Return the place of a parameter in the recipe, or that of the stage where it is not set."""
    setting = stage.parameters.get(parameter)
    return str(stage.mark if setting is None else setting.mark)


def _value(wanted: Parameter, stage: Stage, models: Sequence[Entry], marks: dict[str, Mark]) -> Any:
    if wanted.per_model:
        return PerModel(
            _first(wanted, (entry.parameters, stage.parameters), marks, entry.mark)
            for entry in models
        )
    return _first(wanted, (stage.parameters,), marks, stage.mark)


def _first(
    wanted: Parameter, levels: Sequence[Parameters], marks: dict[str, Mark], place: Mark
) -> Any:
    for level in levels:
        setting = level.get(wanted.name)
        if setting is not None:
            marks[wanted.name] = setting.mark
            return _checked(wanted, setting)
    if wanted.required:
        problem = f"{wanted.name} is missing"
        raise RecipeError(problem, where=str(place), hint=f"add parameters: {{{wanted.name}: ...}}")
    return wanted.default


def _checked(wanted: Parameter, setting: Setting) -> Any:
    """Return the one value of a setting, of the parameter's type and one of its choices."""
    rule = setting.rules[0]
    if len(setting.rules) > 1 or rule.filter not in (None, "*"):
        problem = f"{wanted.name} has a filter, and is one value for the whole model"
        raise RecipeError(problem, where=str(setting.mark), hint="write a plain value")
    if wanted.kind is Listed:
        return _listed(rule.values)
    if len(rule.values) > 1:
        problem = f"{wanted.name} is a list, and is one value for the whole model"
        raise RecipeError(problem, where=str(setting.mark), hint="write a plain value")
    value = coerce(rule.values[0], wanted.kind, setting.mark)
    error = wanted.problem(value)
    if error is not None:
        raise RecipeError(error.problem, where=str(setting.mark), hint=error.hint)
    return value


def _listed(values: Sequence[Scalar]) -> Listed:
    """Return numbers, or a word; the reader of recipes has let nothing else pass."""
    if len(values) == 1 and isinstance(values[0], str):
        return Listed(word=values[0])
    return Listed(tuple(int(value) for value in values))
