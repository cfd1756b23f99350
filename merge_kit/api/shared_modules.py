"""Which modules of several adapters are the same, whatever names their files have for them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from merge_kit.errors import MismatchError
from merge_kit.io.adapter_values import Adapter, Update
from merge_kit.plan.adapters.groups import Member
from merge_kit.plan.adapters.prefixes import with_one_prefix
from merge_kit.plan.findings import Findings
from merge_kit.plan.models import from_adapter
from merge_kit.recipe.values import NO_PARAMETERS, Entry, Mark, ModelRef

_KOHYA = {"lora_te1_": "text_encoder_", "lora_te2_": "text_encoder_2_", "lora_te_": "text_encoder_"}
Changes = tuple[Update | None, ...]
"""What each adapter does to one module."""


def aligned(
    adapters: Sequence[Adapter], names: Sequence[str], findings: Findings
) -> list[dict[str, Update]]:
    """Return the updates of each adapter by a name that modules have in all of them.

    Updates have that name too, where it is a path.
    """
    if len({adapter.style == "kohya" for adapter in adapters}) > 1:
        return [{_key(one.module): one for one in adapter.updates} for adapter in adapters]
    members = []
    for i, (adapter, name) in enumerate(zip(adapters, names, strict=True)):
        mark = Mark(name, 0, 0)
        entry = Entry(ModelRef(name, mark=mark), NO_PARAMETERS, mark)
        model = replace(from_adapter(name, adapter), label=name)
        members.append(Member(entry, model, adapter, i, (i,)))
    return [
        {name: replace(one, module=name) for one, name in _renamed(member)}
        for member in with_one_prefix(members, findings)
    ]


def _renamed(member: Member) -> list[tuple[Update, str]]:
    return [(one, member.renamed(one.module)) for one in member.adapter.updates]


def by_module(keyed: Sequence[Mapping[str, Update]]) -> dict[str, Changes]:
    """Return what each adapter does to each module, by the name that the first of them gives it."""
    found: dict[str, Changes] = {}
    for key in dict.fromkeys(key for updates in keyed for key in updates):
        changes = tuple(updates.get(key) for updates in keyed)
        named = next(change for change in changes if change is not None)
        found[named.module] = changes
    return found


def _key(module: str) -> str:
    """Return what the names of a module in all styles have in common: kohya has no dots."""
    for prefix, component in _KOHYA.items():
        if module.startswith(prefix):
            return component + module.removeprefix(prefix)
    return re.sub(r"[./]", "_", module.removeprefix("lora_"))


def check_shapes(found: Mapping[str, Changes], names: Sequence[str]) -> None:
    """Refuse adapters that cannot have one base."""
    for module, changes in found.items():
        held = [(name, change) for name, change in zip(names, changes, strict=True) if change]
        first, one = held[0]
        for name, other in held[1:]:
            if _shape(one) != _shape(other):
                problem = f"changes {_shown(one)} in {first} and {_shown(other)} in {name}"
                hint = "only adapters of one base model can be compared"
                raise MismatchError(problem, where=module, hint=hint)


def _shape(update: Update) -> tuple[int, ...]:
    """Return outputs, inputs (with the kernel of a convolution), and experts."""
    return (update.b.spec.shape[0], *update.a.spec.shape[1:], update.experts)


def _shown(update: Update) -> str:
    outputs, *inputs, experts = _shape(update)
    sizes = " x ".join(map(str, (outputs, *inputs)))
    return f"{experts} experts of {sizes}" if experts else f"a matrix of {sizes}"
