"""A stack of slices as items: the output's layers, and what stands before and after them."""

from __future__ import annotations

from collections.abc import Sequence

from merge_kit.architecture.roles import outside_role
from merge_kit.architecture.stacks import Stack, layer_name, same_place, split_layer
from merge_kit.architecture.ties import head_name, is_tied
from merge_kit.core.layers import LayerList, Layers
from merge_kit.errors import MismatchError, PlanError
from merge_kit.methods.registry import find
from merge_kit.plan.assemble import Assembler, Assembly, Names, Sliced, tied_embedding
from merge_kit.plan.holes import hole
from merge_kit.plan.items import Group, Item
from merge_kit.plan.layer_origins import LayerOrigin
from merge_kit.plan.models import Model
from merge_kit.plan.repeats import repeats
from merge_kit.plan.side_by_side import SideBySide
from merge_kit.recipe.values import Parameters, Slice

Taken = Sequence[tuple[Model, int]]
"""The layers that one output layer is made of."""


class Slicer:
    """Builds the items of one stack of slices.

    Args:
        maker: What makes items of groups of models.
        stack: The stack as the donor names it; the output's layers are named like it.
        keep: Which tensors belong to it.
    """

    def __init__(self, maker: Assembler, stack: Stack, keep: Names) -> None:
        self.maker, self.stack, self.keep = maker, stack, keep

    def fill(
        self, result: Assembly, slices: Sequence[Slice], levels: Sequence[Parameters]
    ) -> list[Item]:
        """Return the items of slices; the result learns where each layer comes from.

        Args:
            levels: Parameters of module and recipe.
        """
        groups = [self._group(part, levels) for part in slices]
        fitting = [self._can_slice(p, g) for p, g in zip(slices, groups, strict=True)]
        if not all(fitting):
            return []
        layers: list[Item] = []
        taken: list[Taken] = []
        beside = SideBySide(self.maker.donor, self.stack)
        for group in groups:
            for at, t in _layers_of(group):
                self._check(group, len(taken), at, beside)
                layers += self._layer(group, len(taken), at, t)
                result.origins.append(self._origin(group, len(taken), at))
                taken.append(at)
        if not taken:
            self._refuse_nothing(slices[0])
            return []
        result.sliced.append(Sliced(self.stack, tuple(at[0] for at in taken)))
        for note in repeats(self.stack.prefix, taken, self.maker.stage.name):
            self.maker.findings.note(note)
        before = self._outside(groups[0], "before")
        first = [(model, 0) for model in groups[0].models]
        before += self._layer(groups[0], 0, first, 0.0, extras=True)
        after = [*self._outside(groups[-1], "after"), *self._own_head(groups[-1])]
        for part, items in ((slices[0], before), (slices[-1], after)):
            for error in beside.outside(items, str(part.mark)):
                self.maker.findings.problem(error)
        return [*before, *layers, *after]

    def _group(self, part: Slice, levels: Sequence[Parameters]) -> Group:
        base, method = part.base_model or self.maker.stage.base_model, part.merge_method
        return self.maker.group(
            part.sources,
            (part.parameters, *levels),
            base=base,
            add_base=False,
            method=method,
            mark=part.mark if method else None,
        )

    def _origin(self, group: Group, out: int, at: Taken) -> LayerOrigin:
        sources = tuple((model.key, layer) for model, layer in at)
        method = "" if group.method == "passthrough" else group.method
        labels = labels_of([model for model, _ in at])
        return LayerOrigin(self.stack.prefix, out, sources, method, labels)

    def _layer(
        self, group: Group, out: int, at: Taken, t: float, *, extras: bool = False
    ) -> list[Item]:
        """Return the items of a layer, or of what the first one stores for all of them."""
        own = [(model, self._stack_of(model) or self.stack, layer) for model, layer in at]
        suffixes = dict.fromkeys(
            suffix
            for model, theirs, layer in own
            for suffix in model.by_layer(theirs).get(layer, {})
            if (suffix in model.first_layer_extras(theirs)) is extras
        )
        items: list[Item] = []
        for suffix in suffixes:
            names = [layer_name(theirs, layer, suffix) for _, theirs, layer in own]
            items += self.maker.make(group, layer_name(self.stack, out, suffix), names, t)
        return items

    def _check(self, group: Group, out: int, at: Taken, beside: SideBySide) -> None:
        """Refuse a layer that cannot stand there, or not beside the others.

        A first layer that is built otherwise than all others is neither moved nor replaced: the
        program that loads the output builds the first layer in its own way, and would leave out or
        make up the tensors in question.
        """
        for entry, (model, layer) in zip(group.entries, at, strict=True):
            own = self._stack_of(model) or self.stack
            lacks = model.first_layer_lacks(own)
            if lacks and (layer == 0) != (out == 0):
                problem = (
                    f"layer {layer} of {model.label} would be layer {out}, and of its layers only "
                    f"the first has no {', '.join(sorted(lacks))}"
                )
                hint = "begin with layer 0, and take it nowhere else"
                self.maker.findings.problem(PlanError(problem, where=str(entry.mark), hint=hint))
            if self.stack == self.maker.donor.described and _is_absent(model, own, layer):
                problem = f"layer {layer} of {model.label} has no tensors"
                hint = "is the download complete? its other layers have some"
                self.maker.findings.problem(
                    MismatchError(problem, where=str(entry.mark), hint=hint)
                )
        model, layer = at[0]
        mark = group.entries[0].mark
        error = beside.problem(model, self._stack_of(model) or self.stack, layer, str(mark))
        if error is not None:
            self.maker.findings.problem(error)
        for one, number in at:
            own = self._stack_of(one) or self.stack
            for note in (beside.note(one, own), hole(one, own, number)):
                if note is not None:
                    self.maker.findings.note(note)

    def _outside(self, group: Group, role: str) -> list[Item]:
        pairs = sorted(group.pairs(), key=lambda pair: not group.is_base(pair[0]))
        names = dict.fromkeys(name for _, model in pairs for name in model.tensors)
        stacks = tuple(dict.fromkeys(own for _, model in pairs for own in model.stacks))
        items: list[Item] = []
        for name in names:
            if not self.keep(name) or split_layer(name, self.stack) is not None:
                continue
            if outside_role(name, self.stack, stacks) == role:
                items += self.maker.make(group, name, [name] * len(group.models), 0.0)
        return items

    def _own_head(self, group: Group) -> list[Item]:
        """Return the head of tied models that end a stack with the config of an untied one.

        They do not store it, and the output's embedding is another's: without an item of its own
        the output would have no head.
        """
        donor = self.maker.donor
        name = head_name(donor.tensors)
        if name is None or not self.keep(name) or is_tied(donor.config) is not False:
            return []
        stand_ins = [tied_embedding(model, name, None) for model in group.models]
        if name in self.maker.made or None in stand_ins:
            return []
        return self.maker.make(group, name, [name] * len(group.models), 0.0)

    def _can_slice(self, part: Slice, group: Group) -> bool:
        fine, findings = True, self.maker.findings
        if find(group.method).needs_base and not group.has_base:
            problem = f"{group.method} needs the base model among the sources of this slice"
            hint = "add it with its layer_range"
            findings.problem(PlanError(problem, where=str(part.mark), hint=hint))
            fine = False
        for entry, model in group.pairs():
            own = self._stack_of(model)
            if own is None or (entry.layers and entry.layers.stop > own.count):
                error = _beyond(entry.layers, model, own)
                findings.problem(PlanError(error[0], where=str(entry.mark), hint=error[1]))
                fine = False
        return fine

    def _refuse_nothing(self, first: Slice) -> None:
        problem = f"the slices take no layer of {self.stack.prefix or 'the model'}"
        hint = "the end of a layer_range is not included: [0, 16] is 16 layers, [5, 5] is none"
        self.maker.findings.problem(PlanError(problem, where=str(first.mark), hint=hint))

    def _stack_of(self, model: Model) -> Stack | None:
        """Return a model's stack of the same place: of that name, or what stands for it there."""
        if self.stack == self.maker.donor.described:
            named = next((s for s in model.stacks if s.prefix == self.stack.prefix), None)
            return named or model.described
        return same_place(self.stack, model.stacks)


def labels_of(models: Sequence[Model]) -> tuple[str, ...]:
    """Return what the map of layers calls models, where adapters are applied to one of them."""
    changed = any(model.overlay is not None for model in models)
    return tuple(model.label for model in models) if changed else ()


def _is_absent(model: Model, stack: Stack, layer: int) -> bool:
    """Return whether nothing of a layer is there, in a model whose config knows no such layers."""
    return layer not in model.by_layer(stack) and "block_configs" not in (model.config or {})


def _layers_of(group: Group) -> list[tuple[Taken, float]]:
    """Return what each layer of a slice is made of, with its depth in the slice."""
    spans = [entry.layers for entry in group.entries if entry.layers is not None]
    count = len(spans[0])
    return [
        (
            [(model, span[k]) for model, span in zip(group.models, spans, strict=True)],
            k / (count - 1) if count > 1 else 1.0,
        )
        for k in range(count)
    ]


def _beyond(layers: Layers | None, model: Model, own: Stack | None) -> tuple[str, str]:
    """Return problem and hint for layers that a model does not have."""
    if own is None:
        stacks = ", ".join(f"{s.prefix} ({s.count})" for s in model.stacks) or "none"
        return f"{model.label} has no layers of this place", f"its layers: {stacks}"
    has = f"{own.count} layers, numbered from 0"
    if isinstance(layers, LayerList):
        wrong = next(number for number in layers.numbers if number >= own.count)
        return f"layer {wrong} is beyond {model.label}, which has {has}", "correct the list"
    hint = "the end of a range is not included"
    return f"layer_range {layers} is beyond {model.label}, which has {has}", hint
