"""Why an output does without a tensor of an input, through the stages that feed one another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from merge_kit.core.names import glob_matches
from merge_kit.methods.registry import find
from merge_kit.plan.assemble import Assembly
from merge_kit.plan.models import Ingredient, Model, Overlay
from merge_kit.plan.steps import Made

Stages = Sequence[tuple[Assembly, Sequence[Made], Model]]
"""Of each stage, in order: how it is assembled, what it makes, and its result as a model."""

Tensor = tuple[Model, str]


def ingredients(overlay: Overlay, name: str) -> Sequence[Ingredient]:
    """Return what a tensor of a model with adapters is made of."""
    return overlay.made_of.get(name) or (Ingredient(overlay.under, name, "copied"),)


@dataclass(frozen=True)
class _Stage:
    """One stage, by what it says of the tensors of the models below it.

    Attributes:
        result: What it makes, as a model.
        into: Each tensor that it takes -> the first of its own tensors that is made of it.
        left_out: Each tensor of which it knows why it is not taken -> why.
        models: All that it refers to.
        changed: Each tensor of an adapter -> the tensor of the model that it changes.
    """

    assembly: Assembly
    result: Model
    into: Mapping[Tensor, str]
    left_out: Mapping[Tensor, str]
    models: frozenset[Model]
    changed: Mapping[Tensor, str]


class Reasons:
    """Says of a tensor that no byte of the output is made of why that is so."""

    def __init__(self, stages: Stages) -> None:
        self._stages = [_read(*stage) for stage in reversed(stages)]
        self._known: dict[Tensor, str] = {}

    def of(self, model: Model, name: str) -> str:
        """Return why no output tensor takes this one."""
        tensor = model, name
        if tensor not in self._known:
            self._known[tensor] = self._told(tensor) or self._by_form(tensor)
        return self._known[tensor]

    def _told(self, tensor: Tensor) -> str | None:
        """Return what a stage says of the tensor, or of what it becomes there."""
        for stage in self._stages:
            if tensor in stage.into and stage is not self._stages[0]:
                return self.of(stage.result, stage.into[tensor])
            if tensor in stage.left_out:
                why, is_input = stage.left_out[tensor], tensor[0].checkpoint is not None
                return why if is_input else f"{tensor[0].label}: {why}"
        return None

    def _by_form(self, tensor: Tensor) -> str:
        """Return what the form of the stages tells that refer to the model, of all if none does."""
        stages = [one for one in self._stages if tensor[0] in one.models] or self._stages
        for stage in reversed(stages):
            name = stage.changed.get(tensor, tensor[1])
            rules = (r for r in stage.assembly.stage.tensors if glob_matches(r.match, name))
            rule = next(rules, None)
            if rule is not None and (rule.drop or rule.copy is not None or rule.models is not None):
                return f"rule {rule.match!r}"
        return _form(stages, tensor)


def _form(stages: Sequence[_Stage], tensor: Tensor) -> str:
    """Return why stages take no such tensor: the last one's form of recipe tells."""
    assembly, stage = stages[0].assembly, stages[0].assembly.stage
    name = stages[0].changed.get(tensor, tensor[1])
    if stage.tensors or stage.modules:
        what = "no rule takes it" if stage.tensors else "of no named module or slice"
        found = "taken from" if name in assembly.donor.tensors else "no such tensor in"
        return f"{what}: {found} {assembly.donor.label}"
    if any(one.assembly.stage.slices for one in stages):
        return "in no slice"
    if find(stage.merge_method).makes == "structure" and tensor[0] is not assembly.donor:
        return f"no part of what {stage.merge_method} builds"
    return "the model only lends its files"


def _read(assembly: Assembly, made: Sequence[Made], result: Model) -> _Stage:
    into: dict[Tensor, str] = {}
    models = {assembly.donor, *([assembly.base] if assembly.base is not None else [])}
    for one in made:
        for part in one.item.parts:
            models.add(part.model)
            for tensor in _below(part.model, part.name):
                into.setdefault(tensor, one.item.name)
    left = dict(assembly.left_out)
    for (model, name), why in assembly.left_out.items():
        models.add(model)
        for tensor in _below(model, name):
            left.setdefault(tensor, why)
    overlays = [model.overlay for model in models if model.overlay is not None]
    for overlay in overlays:
        models |= {overlay.under, *(adapter for adapter, _ in overlay.adapters)}
    changed = {tensor: name for overlay in overlays for tensor, name in _changes(overlay)}
    return _Stage(assembly, result, into, left, frozenset(models), changed)


def _below(model: Model, name: str) -> Iterator[Tensor]:
    """Yield the tensors that stages or files give: of a model with adapters, those below it."""
    if model.overlay is None:
        yield model, name
        return
    for used in ingredients(model.overlay, name):
        yield from _below(used.model, used.tensor)


def _changes(overlay: Overlay) -> Iterator[tuple[Tensor, str]]:
    """Yield each tensor of an adapter with the name of that of the model that it changes."""
    for name, parts in overlay.made_of.items():
        for used in parts:
            if used.model is not overlay.under:
                yield (used.model, used.tensor), name
