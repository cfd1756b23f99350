"""A stage of a recipe as items: one for each output tensor, with where it comes from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from merge_kit.architecture.roles import outside_role
from merge_kit.architecture.stacks import Stack, layer_name, split_layer
from merge_kit.architecture.ties import embedding_for, is_head, is_tied
from merge_kit.errors import MismatchError, PlanError
from merge_kit.methods.registry import find
from merge_kit.plan.findings import Findings
from merge_kit.plan.inputs import Inputs
from merge_kit.plan.items import Group, Item, Part
from merge_kit.plan.models import Model
from merge_kit.plan.values import LayerOrigin
from merge_kit.recipe.values import NO_PARAMETERS, Entry, ModelRef, Parameters, Slice, Stage

Names = Callable[[str], bool]


@dataclass
class Assembly:
    """What a stage turns into.

    Attributes:
        donor: The model whose config and side files the result takes: the base, or the first.
        stack: The stack that was sliced, or None.
        origins: Where each of its output layers comes from.
    """

    stage: Stage
    donor: Model
    base: Model | None
    items: list[Item] = field(default_factory=list)
    stack: Stack | None = None
    origins: list[LayerOrigin] = field(default_factory=list)
    first_sources: list[tuple[Model, int]] = field(default_factory=list)


class Assembler:
    """Builds the items of one stage.

    Args:
        inputs: The models that the stage refers to.
        findings: Where problems go.
    """

    def __init__(self, stage: Stage, inputs: Inputs, findings: Findings) -> None:
        self.stage, self.inputs, self.findings = stage, inputs, findings
        self.base = inputs.find(stage.base_model) if stage.base_model else None
        self._missing: dict[tuple[str, str], list[str]] = defaultdict(list)

    def group(
        self,
        entries: Sequence[Entry],
        levels: Sequence[Parameters],
        *,
        base: ModelRef | None,
        add_base: bool,
        method: str | None = None,
    ) -> Group:
        """Return the models that are merged together; an unlisted base is added in models form."""
        listed = list(entries)
        models = [self.inputs.find(entry.model) for entry in listed]
        base_model = self.inputs.find(base) if base else None
        if base and base_model is not None and add_base and base_model not in models:
            listed.append(Entry(base, NO_PARAMETERS, base.mark))
            models.append(base_model)
        name = method or self.stage.merge_method
        mark = self.stage.mark
        return Group(tuple(listed), tuple(models), base_model, tuple(levels), name, mark)

    def flat(self, group: Group, keep: Names, names: Iterable[str] | None = None) -> list[Item]:
        """Return an item for each tensor name that the models of a group have."""
        lead = group.base or group.models[0]
        if names is None:
            if not self._same_depth(group, lead, keep):
                return []
            order = [lead, *(m for m in group.models if m is not lead)]
            names = dict.fromkeys(name for model in order for name in model.tensors)
        items = []
        for name in names:
            if not keep(name):
                continue
            parts = self.parts(group, dict.fromkeys(group.models, name))
            items.append(self.item(group, name, parts, _depth(name, lead.stacks)))
        return items

    def item(self, group: Group, name: str, parts: tuple[Part, ...], t: float) -> Item:
        """Return an item that merges parts."""
        component = parts[0].model.tensors[parts[0].name].component if parts else ""
        heads = [part.model.label for part in parts if part.substitute]
        note = f"the tied head of {', '.join(heads)} is its embedding" if heads else ""
        return Item(
            name, component, parts, group.levels, t, group.method, group.mark, "merge", note
        )

    def parts(self, group: Group, names: dict[Model, str]) -> tuple[Part, ...]:
        """Return each model's tensor; what a model lacks is noted as missing."""
        parts = []
        for entry, model in group.pairs():
            name = names[model]
            is_base = model is group.base
            if name in model.tensors:
                parts.append(Part(entry, model, name, is_base))
                continue
            holder = next((m for m, n in names.items() if n in m.tensors), model)
            stand_in = _tied_embedding(model, holder, name)
            if stand_in is not None:
                parts.append(Part(entry, model, stand_in, is_base, substitute=True))
            else:
                self._missing[model.label, holder.label].append(name)
        return tuple(parts)

    def sliced(
        self, slices: Sequence[Slice], stack: Stack, levels: Sequence[Parameters], keep: Names
    ) -> tuple[list[Item], list[LayerOrigin], list[tuple[Model, int]]]:
        """Return the items of a stack of slices, where each layer comes from, and first sources."""
        layers: list[Item] = []
        origins: list[LayerOrigin] = []
        firsts: list[tuple[Model, int]] = []
        groups = []
        for part in slices:
            base = part.base_model or self.stage.base_model
            own = (part.parameters, *levels)
            group = self.group(part.sources, own, base=base, add_base=False)
            if not self._can_slice(part, group, stack):
                continue
            groups.append(group)
            spans = [entry.layers for entry in group.entries if entry.layers is not None]
            count = len(spans[0])
            for k in range(count):
                out = len(origins)
                at = [(m, s.start + k) for m, s in zip(group.models, spans, strict=True)]
                origins.append(LayerOrigin(stack.prefix, out, tuple((m.key, i) for m, i in at)))
                firsts.append(at[0])
                t = k / (count - 1) if count > 1 else 1.0
                layers += self._layer(group, stack, out, at, t)
        if len(groups) < len(slices):
            return [], [], []
        before = self._outside(groups[0], stack, keep, "before")
        if origins:
            first = [(model, 0) for model in groups[0].models]
            before += self._layer(groups[0], stack, 0, first, 0.0, extras=True)
        after = self._outside(groups[-1], stack, keep, "after")
        return [*before, *layers, *after], origins, firsts

    def _layer(
        self,
        group: Group,
        stack: Stack,
        out: int,
        at: list[tuple[Model, int]],
        t: float,
        *,
        extras: bool = False,
    ) -> list[Item]:
        """Return the items of a layer, or of what the first one stores for all of them."""
        own = {model: _layer_names(model, stack_of(model, stack), layer) for model, layer in at}
        suffixes = dict.fromkeys(
            suffix
            for model, names in own.items()
            for suffix in names
            if (suffix in _extras(model, stack)) is extras
        )
        items = []
        for suffix in suffixes:
            names = {m: n.get(suffix, layer_name(stack, out, suffix)) for m, n in own.items()}
            parts = self.parts(group, names)
            items.append(self.item(group, layer_name(stack, out, suffix), parts, t))
        return items

    def _outside(self, group: Group, stack: Stack, keep: Names, role: str) -> list[Item]:
        order = [*([group.base] if group.base in group.models else []), *group.models]
        names = dict.fromkeys(n for m in order if m for n in m.tensors)
        stacks = tuple(dict.fromkeys(s for m in order if m for s in m.stacks))
        items = []
        for name in names:
            if not keep(name) or split_layer(name, stack) is not None:
                continue
            if outside_role(name, stack, stacks) == role:
                parts = self.parts(group, dict.fromkeys(group.models, name))
                items.append(self.item(group, name, parts, 0.0))
        return items

    def _can_slice(self, part: Slice, group: Group, stack: Stack) -> bool:
        fine = True
        method = find(group.method)
        if method.needs_base and group.base not in group.models:
            problem = f"{group.method} needs the base model among the sources of this slice"
            self.findings.problem(
                PlanError(problem, where=str(part.mark), hint="add it with its layer_range")
            )
            fine = False
        for entry, model in group.pairs():
            own = stack_of(model, stack)
            if own is None or (entry.layers and entry.layers.stop > own.count):
                has = "no such layers" if own is None else f"{own.count} layers, numbered from 0"
                self.findings.problem(
                    PlanError(
                        f"layer_range {entry.layers} is beyond {model.label}, which has {has}",
                        where=str(entry.mark),
                        hint="the end of a range is not included",
                    )
                )
                fine = False
        return fine

    def _same_depth(self, group: Group, lead: Model, keep: Names) -> bool:
        fine = True
        for model in group.models:
            for stack in lead.stacks:
                other = next((s for s in model.stacks if s.prefix == stack.prefix), None)
                kept = keep(layer_name(stack, 0, "x")) or keep(stack.prefix)
                if other is not None and kept and other.count != stack.count:
                    self.findings.problem(
                        MismatchError(
                            f"{model.label} has {other.count} layers in {stack.prefix}, "
                            f"{lead.label} has {stack.count}",
                            where=str(group.mark),
                            hint="choose layers with slices and layer_range",
                        )
                    )
                    fine = False
        return fine

    def report_missing(self) -> None:
        """Turn what models lack into problems, one a model."""
        for (model, holder), names in self._missing.items():
            unique = list(dict.fromkeys(names))
            shown = ", ".join(unique[:5]) + (", ..." if len(unique) > 5 else "")
            self.findings.problem(
                MismatchError(
                    f"lacks {len(unique)} tensors that {holder} has: {shown}",
                    where=model,
                    hint="are the models of one architecture? rules under `tensors:` can take "
                    "single tensors from one model or drop them",
                )
            )


def stack_of(model: Model, stack: Stack) -> Stack | None:
    """Return a model's stack of the same place: of that name, else the one config describes."""
    return next((s for s in model.stacks if s.prefix == stack.prefix), model.described)


def _tied_embedding(model: Model, holder: Model, name: str) -> str | None:
    """Return what stands in for a head that a tied model does not store."""
    if not is_head(name) or is_tied(model.config) is not True or name not in holder.tensors:
        return None
    return embedding_for(name, model.specs, holder.specs[name].shape)


def _extras(model: Model, stack: Stack) -> frozenset[str]:
    own = stack_of(model, stack)
    return frozenset() if own is None else model.first_layer_extras(own)


def _layer_names(model: Model, stack: Stack | None, layer: int) -> Mapping[str, str]:
    """Return suffix -> full name of one layer's tensors."""
    return {} if stack is None else model.by_layer(stack).get(layer, {})


def _depth(name: str, stacks: Sequence[Stack]) -> float:
    for stack in stacks:
        found = split_layer(name, stack)
        if found is not None:
            return found[0] / (stack.count - 1) if stack.count > 1 else 1.0
    return 0.0
