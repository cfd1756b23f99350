"""The form a stage is written in: models, slices, modules, or rules over tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from merge_kit.architecture.components import component_names, component_of
from merge_kit.architecture.stacks import Stack, find_stacks
from merge_kit.core.names import glob_matches, nearest
from merge_kit.errors import PlanError
from merge_kit.plan.assemble import Assembler, Assembly
from merge_kit.plan.findings import Findings
from merge_kit.plan.inputs import Inputs, listed
from merge_kit.plan.items import Item, Part
from merge_kit.plan.models import Model
from merge_kit.recipe.values import NO_PARAMETERS, Entry, Module, Stage, TensorRule


def assemble(stage: Stage, inputs: Inputs, findings: Findings) -> Assembly:
    """Return every output tensor of a stage with where it comes from."""
    maker = Assembler(stage, inputs, findings)
    donor = maker.base or inputs.find(next(listed(stage)))
    result = Assembly(stage, donor, maker.base)
    if stage.tensors:
        result.items = _ruled(stage, maker, donor)
    elif stage.models:
        group = maker.group(stage.models, (stage.parameters,), base=stage.base_model, add_base=True)
        result.items = maker.flat(group, _all)
    elif stage.slices:
        _slice(maker, result, donor.described)
    else:
        _modules(maker, result, findings)
    maker.report_missing()
    return result


def _all(name: str) -> bool:
    del name
    return True


def _slice(maker: Assembler, result: Assembly, stack: Stack | None) -> None:
    stage = result.stage
    if stack is None:
        found = ", ".join(s.prefix for s in result.donor.stacks) or "none"
        maker.findings.problem(
            PlanError(
                f"config.json of {result.donor.label} does not say which layers to slice",
                where=str(stage.mark),
                hint=f"write modules: with the name of a stack; stacks here: {found}",
            )
        )
        return
    result.stack = stack
    result.items, result.origins, result.first_sources = maker.sliced(
        stage.slices, stack, (stage.parameters,), _all
    )


def _modules(maker: Assembler, result: Assembly, findings: Findings) -> None:
    stage, donor = result.stage, result.donor
    keys = [module.name for module in stage.modules]
    valid = component_names(donor.tensors, donor.stacks)
    owner = {name: component_of(name, keys, donor.stacks) for name in donor.tensors}
    for module in stage.modules:
        if module.name not in owner.values():
            findings.problem(
                PlanError(
                    f"no tensors belong to module {module.name!r}",
                    where=str(module.mark),
                    hint=nearest(module.name, valid),
                )
            )
            continue
        result.items += _module(maker, result, module, keys)
    left = [name for name, module in owner.items() if module is None]
    if left:
        entry = Entry(stage.base_model or next(listed(stage)), NO_PARAMETERS, stage.mark)
        findings.note(f"{len(left)} tensors of no named module are copied from {donor.label}")
        result.items += [_copy(maker, name, donor, entry, "of no named module") for name in left]
    order = {name: i for i, name in enumerate(donor.tensors)}
    if not result.origins:
        result.items.sort(key=lambda item: order.get(item.name, len(order)))


def _module(maker: Assembler, result: Assembly, module: Module, keys: Sequence[str]) -> list[Item]:
    stage, donor = result.stage, result.donor
    levels = (module.parameters, stage.parameters)

    def keep(name: str) -> bool:
        return component_of(name, keys, donor.stacks) == module.name

    if module.models:
        group = maker.group(module.models, levels, base=stage.base_model, add_base=True)
        return maker.flat(group, keep)
    inside = find_stacks(name for name in donor.tensors if keep(name))
    stack = next((s for s in inside if s == donor.described), next(iter(inside), None))
    if stack is None:
        problem = f"module {module.name!r} has no layers to slice"
        maker.findings.problem(PlanError(problem, where=str(module.mark)))
        return []
    items, origins, firsts = maker.sliced(module.slices, stack, levels, keep)
    if result.stack is not None:
        maker.findings.problem(
            PlanError(
                "two modules with slices in one stage",
                where=str(module.mark),
                hint="slice one in a stage with a name, and the other in a stage that uses it",
            )
        )
    result.stack, result.origins, result.first_sources = stack, origins, firsts
    return items


def _copy(maker: Assembler, name: str, model: Model, entry: Entry, note: str) -> Item:
    held = model.tensors[name]
    part = Part(entry, model, name, model is maker.base)
    stage = maker.stage
    levels = (stage.parameters,)
    return Item(name, held.component, (part,), levels, 0.0, "passthrough", stage.mark, "copy", note)


def _ruled(stage: Stage, maker: Assembler, donor: Model) -> list[Item]:
    """Return the base's tensors, changed where a rule matches, and what rules add to them."""
    base_entry = Entry(stage.base_model or next(listed(stage)), NO_PARAMETERS, stage.mark)
    others = [maker.inputs.find(ref) for ref in listed(stage)]
    names = dict.fromkeys(name for model in [donor, *others] for name in model.tensors)
    items, matched = [], set()
    for name in names:
        rule = next((r for r in stage.tensors if glob_matches(r.match, name)), None)
        if rule is None:
            if name in donor.tensors:
                items.append(_copy(maker, name, donor, base_entry, "no rule matches"))
            continue
        matched.add(rule.match)
        if rule.drop:
            continue
        items += _by_rule(maker, rule, name)
    for rule in stage.tensors:
        if rule.match not in matched:
            maker.findings.problem(
                PlanError(
                    f"no tensor is left for {rule.match!r}",
                    where=str(rule.mark),
                    hint=nearest(rule.match.strip("*."), names) + "; the first rule that matches "
                    "a tensor takes it, `*` also crosses dots",
                )
            )
    return items


def _by_rule(maker: Assembler, rule: TensorRule, name: str) -> list[Item]:
    stage = maker.stage
    if rule.copy is not None:
        model = maker.inputs.find(rule.copy)
        entry = Entry(rule.copy, NO_PARAMETERS, rule.mark)
        if name in model.tensors:
            return [_copy(maker, name, model, entry, f"copied from {model.label} by rule")]
        maker.findings.problem(
            PlanError(
                f"{model.label} has no tensor {name!r} to copy",
                where=str(rule.mark),
                hint="narrow the pattern, or drop the tensor",
            )
        )
        return []
    entries = stage.models if rule.models is None else rule.models
    levels = (rule.parameters, stage.parameters)
    group = maker.group(
        entries, levels, base=stage.base_model, add_base=True, method=rule.merge_method
    )
    return [replace(item, mark=rule.mark) for item in maker.flat(group, _all, [name])]
