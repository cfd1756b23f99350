"""The form a stage is written in: models, slices, modules, or rules over tensors."""

from __future__ import annotations

from collections.abc import Sequence

from merge_kit.architecture.components import component_names, component_of
from merge_kit.architecture.stacks import Stack, find_stacks
from merge_kit.core.names import nearest
from merge_kit.errors import PlanError
from merge_kit.plan.assemble import Assembler, Assembly, depth
from merge_kit.plan.findings import Findings
from merge_kit.plan.inputs import Inputs, listed
from merge_kit.plan.items import Item
from merge_kit.plan.slicing import Slicer
from merge_kit.recipe.values import NO_PARAMETERS, Entry, Module, Stage


def assemble(stage: Stage, inputs: Inputs, findings: Findings) -> Assembly:
    """Return every output tensor of a stage with where it comes from."""
    maker = Assembler(stage, inputs, findings)
    result = Assembly(stage, maker.donor, maker.base)
    if stage.tensors:
        _rules(maker, result)
    elif stage.models:
        group = maker.group(stage.models, (stage.parameters,), base=stage.base_model, add_base=True)
        result.items = maker.flat(group, _all)
    elif stage.slices:
        _slice(maker, result, maker.donor.described)
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
    result.items = Slicer(maker, stack, _all).fill(result, stage.slices, (stage.parameters,))


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
        findings.note(f"{len(left)} tensors of no named module are copied from {donor.label}")
        result.items += _of_donor(maker, left, "of no named module")
    order = {name: i for i, name in enumerate(donor.tensors)}
    if not result.sliced:
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
    if any(one.stack.prefix == stack.prefix for one in result.sliced):
        problem = f"two modules slice {stack.prefix or 'the numbered layers'}"
        hint = "write one module with the slices of both"
        maker.findings.problem(PlanError(problem, where=str(module.mark), hint=hint))
        return []
    return Slicer(maker, stack, keep).fill(result, module.slices, levels)


def _of_donor(maker: Assembler, names: Sequence[str], why: str) -> list[Item]:
    """Return copies of the donor's tensors, but for those that rules take."""
    stage, donor = maker.stage, maker.donor
    entry = Entry(stage.base_model or next(listed(stage)), NO_PARAMETERS, stage.mark)
    group = maker.group(stage.models, (stage.parameters,), base=entry.model, add_base=True)
    items: list[Item] = []
    for name in names:
        if maker.rules.of(name) is None:
            maker.made.add(name)
            items.append(maker.copy(name, donor, entry, why))
        else:
            items += maker.make(group, name, [name] * len(group.models), depth(name, donor.stacks))
    return items


def _rules(maker: Assembler, result: Assembly) -> None:
    """Take the base's tensors, changed where a rule matches, and what only rules bring in."""
    stage = maker.stage
    if stage.slices or stage.modules:
        maker.findings.problem(
            PlanError(
                "tensors: beside slices or modules, where what no rule matches has no one base",
                where=str(stage.tensors[0].mark),
                hint="give the stack a name: in a document of its own, and use it as base_model "
                "of the rules in another",
            )
        )
        return
    result.items = _of_donor(maker, list(maker.donor.tensors), "no rule matches")
    models = [maker.donor, *(maker.find(ref, stage.base_model) for ref in listed(stage))]
    names = dict.fromkeys(name for model in models for name in model.tensors)
    for name in names:
        rule = maker.rules.of(name) if name not in maker.made else None
        if rule is not None and (rule.copy is not None or rule.models is not None):
            result.items += _of_donor(maker, [name], "")
    for problem in maker.rules.unused(names):
        maker.findings.problem(problem)
