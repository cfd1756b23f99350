"""Task vectors as values: differences of models, their sums, and what pruning keeps of a sum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from merge_kit.api.requests import Node
from merge_kit.errors import UsageError

How = Literal["magnitude", "random"]
Scope = Literal["tensor", "model"]


@dataclass(frozen=True, slots=True)
class Prune:
    """What is kept of a task vector.

    Attributes:
        density: Share that is kept, in [0, 1].
        how: The largest magnitudes, or elements at random, divided by the probability.
        scope: Whether magnitudes are ranked in each tensor or over all of them.
        seed: Of the random choice.
        position: Keeps random choices of one seed apart.
    """

    density: float
    how: How = "magnitude"
    scope: Scope = "tensor"
    seed: int = 0
    position: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.density, bool) or not isinstance(self.density, int | float):
            raise UsageError(f"density is {self.density!r}, expected a number in [0, 1]")
        if not 0 <= self.density <= 1:
            hint = "density is the share that is kept, not a percentage"
            raise UsageError(f"density is {self.density:g}, expected a number in [0, 1]", hint=hint)
        for name, value in (("seed", self.seed), ("position", self.position)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise UsageError(f"{name} is {value!r}, expected a whole number from 0")
        _one_of("how", self.how, ("magnitude", "random"))
        _one_of("scope", self.scope, ("tensor", "model"))
        if self.how == "random" and self.scope == "model":
            hint = "leave scope out"
            raise UsageError("a random choice looks at each element by itself", hint=hint)


@dataclass(frozen=True, slots=True)
class Difference:
    """A model minus its base; without a base, the model holds differences itself."""

    model: Node
    base: Node | None

    @property
    def key(self) -> object:
        """What equal differences have in common."""
        return self.model.key, None if self.base is None else self.base.key

    def __str__(self) -> str:
        return str(self.model) if self.base is None else f"({self.model} - {self.base})"


@dataclass(frozen=True, slots=True)
class Pruned:
    """What pruning keeps of a sum."""

    terms: Sum
    prune: Prune

    @property
    def key(self) -> object:
        """What equal ones have in common."""
        return tuple((weight, change.key) for weight, change in self.terms), self.prune

    def __str__(self) -> str:
        return f"({shown(self.terms)} at density {self.prune.density:g})"


Change = Difference | Pruned
Term = tuple[float, Change]
Sum = tuple[Term, ...]


def shown(terms: Sum) -> str:
    """Return a sum as a message shows it."""
    return " + ".join(f"{weight:g} * {change}" for weight, change in terms)


def together(terms: Sum) -> Sum:
    """Return a sum with equal terms taken together, in the order in which they first stand."""
    found: dict[object, Term] = {}
    for weight, change in terms:
        known = found[change.key][0] if change.key in found else 0.0
        found[change.key] = known + weight, change
    return tuple(found.values())


def times(terms: Sum, factor: float) -> Sum:
    """Return a sum with every weight multiplied."""
    return tuple((factor * weight, change) for weight, change in terms)


def differences(terms: Sum) -> Iterator[Difference]:
    """Yield the differences that a sum is made of, those inside pruned sums too."""
    for _, change in terms:
        if isinstance(change, Difference):
            yield change
        else:
            yield from differences(change.terms)


def prunes(terms: Sum) -> Iterator[Prune]:
    """Yield every pruning inside a sum."""
    for _, change in terms:
        if isinstance(change, Pruned):
            yield from prunes(change.terms)
            yield change.prune


def pruned(terms: Sum, prune: Prune) -> Sum:
    """Return what pruning keeps of a sum.

    Raises:
        UsageError: If a choice over the whole model would need one by tensor first.
    """
    if prune.density == 1:
        return terms
    inner = [one for one in prunes(terms) if one.how == "magnitude"]
    if prune.scope == "model" and any(one.scope == "tensor" for one in inner):
        problem = "a task vector that is pruned by tensor is pruned again over the whole model"
        raise UsageError(problem, hint="prune over the whole model first, or save it between")
    return ((1.0, Pruned(terms, prune)),)


def _one_of(name: str, found: object, valid: tuple[str, ...]) -> None:
    if found not in valid:
        raise UsageError(f"{name} is {found!r}, expected {' or '.join(map(repr, valid))}")
