"""With what coefficient each adapter counts, module by module and for each adapter that is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merge_kit.architecture.stacks import find_stacks
from merge_kit.errors import ParameterError, RecipeError
from merge_kit.methods.base import PerModel
from merge_kit.methods.updates import AdapterMethod
from merge_kit.plan.adapters.groups import Change, Member, ModuleGroup
from merge_kit.plan.assemble import depth
from merge_kit.plan.evaluate import Evaluator
from merge_kit.plan.filters import Filters
from merge_kit.plan.inputs import Inputs
from merge_kit.plan.items import Item, Part
from merge_kit.recipe.values import Stage


@dataclass(frozen=True, slots=True)
class Use:
    """One adapter that is made.

    Attributes:
        folder: In the output, "" where there is one adapter.
        weights: One an entry of `models`; None for those of the recipe's parameters.
    """

    folder: str
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Term:
    """One change and what it counts for, its scale apart.

    Attributes:
        entry: Position of the entry of `models` that names it, the first if it counts for several.
    """

    change: Change
    coefficient: float
    entry: int

    @property
    def scale(self) -> float:
        """Coefficient and scale."""
        return self.coefficient * self.change.update.scale


@dataclass(frozen=True, slots=True)
class Combination:
    """What one module of one adapter that is made is the sum of, if its method adds.

    Attributes:
        method: With its evaluated parameters, the weights of this use among them.
        terms: Every change of the module, those of coefficient 0 too.
    """

    use: Use
    module: ModuleGroup
    method: AdapterMethod
    terms: tuple[Term, ...]

    @property
    def counting(self) -> tuple[Term, ...]:
        """The terms that change something."""
        return tuple(term for term in self.terms if term.scale)

    @property
    def kept(self) -> Change | None:
        """The change that comes out as it went in, or None."""
        counting = [term for term in self.terms if term.coefficient]
        if len(counting) != 1 or counting[0].coefficient != 1:
            return None
        change = counting[0].change
        return change if self.method.keeps_one(change.update.rank) else None


def uses(stage: Stage) -> list[Use]:
    """Return the adapters that a stage makes."""
    return [Use(name, weights) for name, weights in stage.uses] or [Use("")]


class Terms:
    """Evaluates the parameters of a stage."""

    def __init__(self, stage: Stage, inputs: Inputs, modules: Sequence[ModuleGroup]) -> None:
        self._stage = stage
        self._models = [(entry, inputs.find(entry.model)) for entry in stage.models]
        self._stacks = find_stacks(module.weight for module in modules)
        self._evaluator = Evaluator()
        self.filters = Filters()
        self._reweighted: dict[tuple[Any, ...], AdapterMethod] = {}

    def method(self, weight: str, use: Use) -> AdapterMethod:
        """Return the method with its parameters for the tensor of this name.

        Raises:
            MergeKitError: If a parameter is missing or wrong.
        """
        stage = self._stage
        item = Item(
            name=weight,
            component="",
            parts=tuple(Part(entry, model, weight, False) for entry, model in self._models),
            levels=(stage.parameters,),
            t=depth(weight, self._stacks),
            method=stage.merge_method,
            mark=stage.mark,
        )
        for level in (stage.parameters, *(entry.parameters for entry, _ in self._models)):
            self.filters.see((level,), [weight])
        method, _, _ = self._evaluator.method(item)
        assert isinstance(method, AdapterMethod)  # the stage was told by that
        if use.weights is None:
            return method
        key = id(method), use.weights
        if key not in self._reweighted:
            weights: Mapping[str, Any] = {"weight": PerModel(use.weights)}
            self._reweighted[key] = replace(method, **weights)
        return self._reweighted[key]

    def weight(self, member: Member, tensor: str, use: Use) -> float:
        """Return the weight of an adapter at a tensor: the sum of those that it is named with."""
        method = self.method(tensor, use)
        weights: Sequence[float] = getattr(method, "weight", ())
        return sum(weights[i] for i in member.entries)

    def combination(self, module: ModuleGroup, use: Use) -> Combination:
        """Return what a module of an adapter that is made is made of.

        Raises:
            MergeKitError: If a parameter is missing or wrong.
        """
        method = self.method(module.weight, use)
        try:
            found = method.coefficients(getattr(method, "weight"))  # noqa: B009  (not of the base)
        except ParameterError as error:
            where, hint = str(self._stage.mark), error.hint
            raise RecipeError(error.problem, where=where, hint=hint) from error
        terms = [
            Term(change, coefficient, entry)
            for change in module.changes
            for entry, coefficient in _of_member(method, change.member, found)
        ]
        return Combination(use, module, method, tuple(terms))


def _of_member(
    method: AdapterMethod, member: Member, found: Sequence[float]
) -> list[tuple[int, float]]:
    """Return entries of an adapter with their coefficients: one, or each time that it is named."""
    if method.additive:
        return [(member.index, sum(found[i] for i in member.entries))]
    return [(i, found[i]) for i in member.entries]


def active(combinations: Sequence[Combination]) -> list[Member]:
    """Return the adapters that count in at least one module of an adapter that is made."""
    found: dict[int, Member] = {}
    for one in combinations:
        for term in one.terms:
            if term.coefficient:
                found.setdefault(term.change.member.index, term.change.member)
    return [found[index] for index in sorted(found)]
