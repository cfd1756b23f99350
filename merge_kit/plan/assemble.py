"""A stage of a recipe as items: one for each output tensor, with where it comes from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from merge_kit.architecture.stacks import Stack, layer_name, split_layer
from merge_kit.architecture.ties import embedding_for, is_head, is_tied
from merge_kit.errors import MismatchError, PlanError
from merge_kit.methods.registry import find
from merge_kit.plan.findings import Findings
from merge_kit.plan.inputs import Inputs
from merge_kit.plan.inputs import listed as listed_models
from merge_kit.plan.items import Group, Item, Part
from merge_kit.plan.layer_origins import LayerOrigin
from merge_kit.plan.models import Model
from merge_kit.plan.rules import Rules
from merge_kit.recipe.values import (
    NO_PARAMETERS,
    Entry,
    Mark,
    ModelRef,
    Parameters,
    Stage,
    TensorRule,
)

Names = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Sliced:
    """A stack of the donor whose layers slices replace.

    Attributes:
        stack: The stack as the donor has it.
        layers: For each output layer, the first model that it comes from, and its number there.
    """

    stack: Stack
    layers: tuple[tuple[Model, int], ...]


@dataclass
class Assembly:
    """What a stage turns into.

    Attributes:
        donor: The model whose config and side files the result takes: the base, or the first.
        sliced: The stacks that slices build.
        origins: Where each of their output layers comes from, one stack after the other.
        left_out: Why a tensor of a model is dropped, where the stage knows better than the form
            of the recipe tells.
    """

    stage: Stage
    donor: Model
    base: Model | None
    items: list[Item] = field(default_factory=list)
    sliced: list[Sliced] = field(default_factory=list)
    origins: list[LayerOrigin] = field(default_factory=list)
    left_out: dict[tuple[Model, str], str] = field(default_factory=dict)


class Assembler:
    """Builds the items of one stage.

    Args:
        inputs: The models that the stage refers to.
        findings: Where problems go.

    Attributes:
        made: Names in the output about which the recipe or a rule has decided.
    """

    def __init__(self, stage: Stage, inputs: Inputs, findings: Findings) -> None:
        self.stage, self.inputs, self.findings = stage, inputs, findings
        self.base = self.find(stage.base_model, None) if stage.base_model else None
        self.donor = self.base or self.find(next(listed_models(stage)), None)
        self.rules = Rules(stage.tensors)
        self.made: set[str] = set()
        self._missing: dict[tuple[str, str], list[str]] = defaultdict(list)

    def find(self, ref: ModelRef, base: ModelRef | None) -> Model:
        """Return the model of a reference; of an adapter alone, the base with it applied.

        Raises:
            PlanError: If it is an adapter, and there is no base.
        """
        model = self.inputs.find(ref)
        if model.adapter is not None:
            if base is None:
                raise PlanError(
                    f"{model.label} is an adapter, and models are merged here",
                    where=str(ref.mark),
                    hint=f"write MODEL+{ref.text}, with the model that it was made for",
                )
            model = self.inputs.under(ref, base)
        for note in model.overlay.notes if model.overlay is not None else ():
            self.findings.note(note)
        return model

    def group(
        self,
        entries: Sequence[Entry],
        levels: Sequence[Parameters],
        *,
        base: ModelRef | None,
        add_base: bool,
        method: str | None = None,
        mark: Mark | None = None,
    ) -> Group:
        """Return the models that are merged together; an unlisted base is added in models form.

        Args:
            levels: Parameters of slice, module and recipe, the narrowest first.
            method: Theirs alone, the stage's by default.
            mark: Where that method is named.
        """
        listed = list(entries)
        models = [self.find(entry.model, base) for entry in listed]
        base_model = self.find(base, None) if base else None
        adds = add_base and base is not None and base not in [entry.model for entry in listed]
        adds = adds and not self._is_one_adapter(listed, method)
        if adds and base is not None and base_model is not None:
            listed.append(Entry(base, NO_PARAMETERS, base.mark))
            models.append(base_model)
        return Group(
            tuple(listed),
            tuple(models),
            base_model,
            base,
            adds,
            tuple(levels),
            method or self.stage.merge_method,
            mark or self.stage.mark,
        )

    def _is_one_adapter(self, listed: Sequence[Entry], method: str | None) -> bool:
        """Return whether one adapter is merged into its base, by a method of one model."""
        takes_one = find(method or self.stage.merge_method).max_inputs == 1
        needs_base = find(method or self.stage.merge_method).needs_base
        alone = len(listed) == 1 and self.inputs.find(listed[0].model).adapter is not None
        return alone and takes_one and not needs_base

    def flat(self, group: Group, keep: Names) -> list[Item]:
        """Return an item for each tensor name that the models of a group have."""
        lead = group.base or group.models[0]
        if not self._same_depth(group, lead, keep):
            return []
        order = [lead, *(m for m in group.models if m is not lead)]
        names = dict.fromkeys(name for model in order for name in model.tensors if keep(name))
        items: list[Item] = []
        for name in names:
            items += self.make(group, name, [name] * len(group.models), depth(name, lead.stacks))
        return items

    def make(self, group: Group, name: str, names: Sequence[str], t: float) -> list[Item]:
        """Return the item of one output tensor: by the rule that takes it, or as a group merges.

        Args:
            name: Its name in the output.
            names: Its name in each model of the group.
            t: Its depth.
        """
        self.made.add(name)
        rule = self.rules.of(name)
        if rule is None:
            return self._whole(group, name, names, t)
        if rule.drop:
            return []
        if rule.copy is not None:
            return self._copied(rule, rule.copy, name)
        method, levels = rule.merge_method or group.method, (rule.parameters, *group.levels)
        own = replace(group, levels=levels, method=method, mark=rule.mark)
        if rule.models is not None:
            base, mark = group.base_ref, rule.mark
            own = self.group(rule.models, levels, base=base, add_base=True, method=method)
            own, names = replace(own, mark=mark), [name] * len(own.models)
        return self._whole(own, name, names, t)

    def _whole(self, group: Group, name: str, names: Sequence[str], t: float) -> list[Item]:
        """Return an item of all models; none where one lacks it, which is a problem by itself."""
        parts = self.parts(group, names)
        return [self.item(group, name, parts, t)] if len(parts) == len(names) else []

    def copy(self, name: str, model: Model, entry: Entry, note: str) -> Item:
        """Return an item that copies one model's tensor of this name."""
        held, levels, mark = model.tensors[name], (self.stage.parameters,), self.stage.mark
        part = Part(entry, model, name, model is self.base)
        component = held.component
        return Item(name, component, (part,), levels, 0.0, "passthrough", mark, "copy", note)

    def _copied(self, rule: TensorRule, ref: ModelRef, name: str) -> list[Item]:
        model = self.find(ref, self.stage.base_model)
        if name in model.tensors:
            entry, note = Entry(ref, NO_PARAMETERS, rule.mark), f"copied from {model.label} by rule"
            return [self.copy(name, model, entry, note)]
        self.findings.problem(
            PlanError(
                f"{model.label} has no tensor {name!r} to copy",
                where=str(rule.mark),
                hint="narrow the pattern, or drop the tensor",
            )
        )
        return []

    def item(self, group: Group, name: str, parts: tuple[Part, ...], t: float) -> Item:
        """Return an item that merges parts."""
        component = parts[0].model.tensors[parts[0].name].component if parts else ""
        heads = [part.model.label for part in parts if part.stands_for]
        note = f"the tied head of {', '.join(heads)} is its embedding" if heads else ""
        return Item(
            name, component, parts, group.levels, t, group.method, group.mark, "merge", note
        )

    def parts(self, group: Group, names: Sequence[str]) -> tuple[Part, ...]:
        """Return each model's tensor; what a model lacks is noted as missing.

        Args:
            names: The tensor's name in each model of the group.
        """
        parts: list[Part] = []
        stored = [(m, n) for m, n in zip(group.models, names, strict=True) if n in m.tensors]
        shape = stored[0][0].specs[stored[0][1]].shape if stored else None
        for (entry, model), name in zip(group.pairs(), names, strict=True):
            stand_in = None if name in model.tensors else tied_embedding(model, name, shape)
            if name not in model.tensors and stand_in is None:
                holder = stored[0][0] if stored else self.donor
                self._missing[model.label, holder.label].append(name)
                continue
            added = group.adds_base and entry is group.entries[-1]
            stands_for = "" if stand_in is None else name
            is_base = group.is_base(entry)
            parts.append(Part(entry, model, stand_in or name, is_base, stands_for, added))
        return tuple(parts)

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


def tied_embedding(model: Model, name: str, shape: tuple[int, ...] | None) -> str | None:
    """Return what stands in for a head that a tied model does not store."""
    if not is_head(name) or is_tied(model.config) is not True:
        return None
    return embedding_for(name, model.specs, shape)


def depth(name: str, stacks: Sequence[Stack]) -> float:
    """Return the depth of a tensor in the stack that holds it; 0 outside layers."""
    for stack in stacks:
        found = split_layer(name, stack)
        if found is not None:
            return found[0] / (stack.count - 1) if stack.count > 1 else 1.0
    return 0.0
