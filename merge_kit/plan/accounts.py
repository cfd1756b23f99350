"""What becomes of every tensor of every input."""

from __future__ import annotations

from collections.abc import Sequence

from merge_kit.core.names import glob_matches
from merge_kit.plan.assemble import Assembly
from merge_kit.plan.models import Model
from merge_kit.plan.steps import Made
from merge_kit.plan.values import Fate


def fates(models: Sequence[Model], stages: Sequence[tuple[Assembly, Sequence[Made]]]) -> list[Fate]:
    """Return one fate for each tensor of each input, in file order."""
    used: dict[tuple[str, str], str] = {}
    for _, made in stages:
        for one in made:
            for part in one.item.parts:
                if used.get((part.model.key, part.name)) != "merged":
                    used[part.model.key, part.name] = one.fate
    rows = []
    for model in models:
        for name in model.tensors:
            what = used.get((model.key, name))
            if what == "merged":
                rows.append(Fate(model.key, name, "merged"))
            elif what == "copied":
                rows.append(Fate(model.key, name, "copied"))
            else:
                rows.append(Fate(model.key, name, "dropped", _why(name, stages)))
    return rows


def _why(name: str, stages: Sequence[tuple[Assembly, Sequence[Made]]]) -> str:
    """Return why no output tensor takes this one."""
    for assembly, _ in stages:
        for rule in assembly.stage.tensors:
            if glob_matches(rule.match, name):
                return f"rule {rule.match!r}"
    assembly = stages[-1][0]
    if assembly.stage.tensors:
        if name in assembly.donor.tensors:
            return f"no rule matches: taken from {assembly.donor.label}"
        return "no rule matches, and the base has no such tensor"
    if assembly.stage.modules:
        return f"of no named module, or outside its slices: taken from {assembly.donor.label}"
    if any(a.stage.slices for a, _ in stages):
        return "in no slice"
    return "the model only lends its files"
