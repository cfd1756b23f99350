"""A method with its parameters for one output tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from merge_kit.errors import ParameterError, PlanError, RecipeError
from merge_kit.methods.base import MergeMethod, PerModel
from merge_kit.methods.registry import Parameter, find, parameters
from merge_kit.plan.items import Item, Part
from merge_kit.recipe.lookup import coerce, lookup
from merge_kit.recipe.values import Mark, Scalar


class Evaluator:
    """Makes methods from parameters; equal parameters share one instance."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], MergeMethod] = {}

    def method(self, item: Item) -> tuple[MergeMethod, Part | None, tuple[Part, ...]]:
        """Return the method of an item, its base part, and its ordinary inputs.

        Raises:
            MergeKitError: If a parameter is missing or out of range, or models are too few or
                too many.
        """
        kind = find(item.method)
        base, inputs = _split(kind, item)
        _check_inputs(kind, item, base, inputs)
        marks: dict[str, Mark] = {}
        values = {p.field: self._value(p, item, inputs, marks) for p in parameters(kind)}
        return self._make(kind, item, values, marks), base, inputs

    def _make(
        self,
        kind: type[MergeMethod],
        item: Item,
        values: dict[str, Any],
        marks: dict[str, Mark],
    ) -> MergeMethod:
        key = (kind, *values.values())
        if key not in self._made:
            try:
                self._made[key] = kind(**values)
            except ParameterError as error:
                where = marks.get(error.parameter, item.mark)
                hint = error.hint or f"see `mergekit methods {item.method}`"
                raise RecipeError(error.problem, where=str(where), hint=hint) from error
        return self._made[key]

    def _value(
        self, wanted: Parameter, item: Item, inputs: Sequence[Part], marks: dict[str, Mark]
    ) -> Any:
        if not wanted.per_model:
            return self._single(wanted, item, marks)
        values = []
        for part in inputs:
            levels = (part.entry.parameters, *item.levels)
            found = lookup(wanted.name, levels, part.stands_for or part.name, item.t)
            if found is not None:
                marks[wanted.name] = found[1]
                values.append(_checked(wanted, found))
            elif wanted.required:
                raise RecipeError(
                    f"{item.method} needs {wanted.name!r} for {part.model.label}",
                    where=str(part.entry.mark),
                    hint=f"set parameters: {{{wanted.name}: ...}} for this model or for all",
                )
            else:
                values.append(wanted.default)
        return PerModel(values)

    def _single(self, wanted: Parameter, item: Item, marks: dict[str, Mark]) -> Any:
        found = lookup(wanted.name, item.levels, item.name, item.t)
        if found is not None:
            marks[wanted.name] = found[1]
            return _checked(wanted, found)
        if wanted.required:
            raise RecipeError(
                f"{item.method} needs {wanted.name!r}",
                where=str(item.mark),
                hint=f"add parameters: {{{wanted.name}: ...}} to the recipe",
            )
        return wanted.default


def _checked(wanted: Parameter, found: tuple[Scalar, Mark]) -> Scalar:
    """Return a value of the parameter's type, one of its choices if it has any."""
    value = coerce(found[0], wanted.kind, found[1])
    error = wanted.problem(value)
    if error is not None:
        raise RecipeError(error.problem, where=str(found[1]), hint=error.hint)
    return value


def _split(kind: type[MergeMethod], item: Item) -> tuple[Part | None, tuple[Part, ...]]:
    if not (kind.needs_base or kind.takes_base):
        return None, item.parts
    base = next((part for part in item.parts if part.is_base), None)
    return base, tuple(part for part in item.parts if not part.is_base)


def _check_inputs(
    kind: type[MergeMethod], item: Item, base: Part | None, inputs: Sequence[Part]
) -> None:
    if kind.needs_base and base is None:
        raise PlanError(
            f"{item.method} needs a base_model", where=str(item.mark), hint="add base_model: ..."
        )
    most = kind.max_inputs
    if len(inputs) >= kind.min_inputs and (most is None or len(inputs) <= most):
        return
    beside = " beside the base" if kind.needs_base else ""
    if most == kind.min_inputs:
        wanted = str(most)
    else:
        few = len(inputs) < kind.min_inputs
        wanted = f"at least {kind.min_inputs}" if few else f"at most {most}"
    names = ", ".join(part.model.label for part in inputs) or "none"
    raise PlanError(
        f"{item.method} takes {wanted} model{'s' if wanted[-1] != '1' else ''}{beside}, "
        f"found {len(inputs)}: {names}",
        where=str(item.mark),
        hint=_fewer(item),
    )


def _fewer(item: Item) -> str:
    """Return what to do about the number of models of an item."""
    if item.method != "passthrough":
        return "see `mergekit methods`"
    if any(part.added for part in item.parts):
        return "an unlisted base_model counts as an input of this method"
    if any(part.entry.layers is not None for part in item.parts):
        return "give each source a slice of its own, or this slice a merge_method that merges"
    return "list one model, or write a merge_method that merges several"
