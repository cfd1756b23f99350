"""The rules of `tensors:` over the names of the output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from merge_kit.core.names import glob_matches, nearest
from merge_kit.errors import PlanError
from merge_kit.recipe.values import TensorRule


class Rules:
    """Finds the rule that takes a tensor: the first that matches its name in the output."""

    def __init__(self, rules: Sequence[TensorRule]) -> None:
        self._rules = rules
        self._used: set[int] = set()  # their places in the list

    def of(self, name: str) -> TensorRule | None:
        """Return the rule that takes a tensor, None where the recipe decides about it."""
        for place, rule in enumerate(self._rules):
            if glob_matches(rule.match, name):
                self._used.add(place)
                return rule
        return None

    def unused(self, names: Iterable[str]) -> Iterator[PlanError]:
        """Yield a problem for each rule that took no tensor.

        Args:
            names: Names of the tensors that there are, for hints.
        """
        known = tuple(names) if len(self._used) < len(self._rules) else ()
        for place, rule in enumerate(self._rules):
            if place not in self._used:
                hint = nearest(rule.match.strip("*."), known)
                yield PlanError(
                    f"no tensor is left for {rule.match!r}",
                    where=str(rule.mark),
                    hint=f"{hint}; the first rule that matches a tensor takes it, `*` also "
                    "crosses dots",
                )
