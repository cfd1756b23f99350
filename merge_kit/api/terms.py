"""Sums of weighted models and weighted task vectors."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from merge_kit.api import changes
from merge_kit.api.changes import Sum
from merge_kit.api.requests import Node
from merge_kit.errors import UsageError


@dataclass(frozen=True, slots=True)
class Terms:
    """A sum: weighted models, and weighted task vectors."""

    models: tuple[tuple[float, Node], ...] = ()
    tasks: Sum = ()

    def plus(self, other: Terms) -> Terms:
        """Return the sum of two sums, equal terms taken together."""
        models: dict[object, tuple[float, Node]] = {}
        for weight, model in (*self.models, *other.models):
            known = models[model.key][0] if model.key in models else 0.0
            models[model.key] = known + weight, model
        return Terms(tuple(models.values()), changes.together((*self.tasks, *other.tasks)))

    def times(self, factor: float) -> Terms:
        """Return the sum with every weight multiplied."""
        if not isfinite(factor):
            raise UsageError(f"found the factor {factor}, expected a finite number")
        models = tuple((factor * weight, model) for weight, model in self.models)
        return Terms(models, changes.times(self.tasks, factor))
