"""What becomes of every tensor of every input."""

from __future__ import annotations

from collections.abc import Sequence

from merge_kit.plan.models import Model
from merge_kit.plan.reasons import Reasons, Stages, ingredients
from merge_kit.plan.steps import Made
from merge_kit.plan.values import Fate

__all__ = ["fates", "ingredients"]


class _Uses:
    """What the tensors of the output are made of, through the stages that feed one another."""

    def __init__(self, stages: Stages) -> None:
        self._made = {(model, one.item.name): one for _, made, model in stages for one in made}
        self._seen: set[tuple[int, bool]] = set()
        self.merged: set[tuple[Model, str]] = set()
        self.copied: set[tuple[Model, str]] = set()
        self.passed_over: set[tuple[Model, str]] = set()
        self.left: dict[tuple[Model, str], str] = {}
        for one in stages[-1][1]:
            self._follow(one, merged=False)

    def _follow(self, one: Made, *, merged: bool) -> None:
        merged = merged or one.fate == "merged"
        if (id(one), merged) in self._seen:
            return
        self._seen.add((id(one), merged))
        for part in one.item.parts:
            if part in one.takes:
                self._take(part.model, part.name, merged=merged)
            else:
                self._pass_over(part.model, part.name)

    def _take(self, model: Model, name: str, *, merged: bool) -> None:
        """Note that a tensor of a model is used, or that of which a stage or adapters make it."""
        if model.overlay is not None:
            for used in ingredients(model.overlay, name):
                if used.what == "dropped":
                    self.left.setdefault((used.model, used.tensor), used.why)
                else:
                    self._take(used.model, used.tensor, merged=merged or used.what == "merged")
        elif (model, name) in self._made:
            self._follow(self._made[model, name], merged=merged)
        else:
            (self.merged if merged else self.copied).add((model, name))

    def _pass_over(self, model: Model, name: str) -> None:
        if model.overlay is None:
            self.passed_over.add((model, name))
            return
        for used in ingredients(model.overlay, name):
            self.passed_over.add((used.model, used.tensor))


def fates(models: Sequence[Model], stages: Stages) -> list[Fate]:
    """Return one fate for each tensor of each input, in file order."""
    uses, reasons, rows = _Uses(stages), Reasons(stages), []
    for model in models:
        idle = model.adapter.dropped if model.adapter is not None else {}
        for name in model.tensors:
            tensor = model, name
            if tensor in uses.merged:
                rows.append(Fate(model.key, name, "merged"))
            elif tensor in uses.copied:
                rows.append(Fate(model.key, name, "copied"))
            elif tensor in uses.left or name in idle:
                rows.append(Fate(model.key, name, "dropped", uses.left.get(tensor) or idle[name]))
            elif tensor in uses.passed_over:
                why = f"on_conflict: {stages[-1][0].stage.on_conflict}"
                rows.append(Fate(model.key, name, "dropped", why))
            else:
                rows.append(Fate(model.key, name, "dropped", reasons.of(model, name)))
    return rows
