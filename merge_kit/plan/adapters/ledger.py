"""What becomes of every tensor of the adapters of a stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from merge_kit.core.tensors import StoredTensor
from merge_kit.io.adapter_values import Update
from merge_kit.plan.models import Model
from merge_kit.plan.sources import Stored
from merge_kit.plan.values import Fate

RANK = {"dropped": 0, "copied": 1, "merged": 2}
"""What says more of a tensor that several things become of."""


class Ledger:
    """Fates as they are decided; of several for one tensor, the most that is done with it."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], tuple[Literal["merged", "copied", "dropped"], str]] = {}

    def enter(
        self,
        what: Literal["merged", "copied", "dropped"],
        model: Model,
        tensors: Iterable[StoredTensor],
        why: str = "",
    ) -> None:
        """Say what becomes of tensors of one adapter."""
        for tensor in tensors:
            key = model.key, tensor.spec.name
            old = self._found.get(key)
            if old is None or RANK[old[0]] < RANK[what]:
                self._found[key] = what, why

    def update(self, model: Model, update: Update, *, copied: bool) -> None:
        """Say that a change is part of the result; its alpha is part of its scale."""
        self.enter("copied" if copied else "merged", model, update.stored)

    def fates(self, models: Sequence[Model]) -> tuple[Fate, ...]:
        """Return a fate for each tensor of each model, in file order."""
        return tuple(
            Fate(model.key, name, *self._of(model, name, held.source))
            for model in models
            for name, held in model.tensors.items()
        )

    def _of(
        self, model: Model, name: str, source: object
    ) -> tuple[Literal["merged", "copied", "dropped"], str]:
        assert isinstance(source, Stored)  # adapters are read from files
        inside = name.rpartition("/")[2]
        adapter = model.adapter
        why = "" if adapter is None else adapter.dropped.get(inside, "no module takes it")
        return self._found.get((model.key, inside), ("dropped", why))
