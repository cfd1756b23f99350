"""Adapters of one model that name its modules with another prefix.

An adapter that was trained on the model without its head calls `layers.0` what others call
`model.layers.0`. Taken by their names, the two would change different modules, and the one that
peft does not find would be lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from merge_kit.plan.adapter_groups import Member
from merge_kit.plan.findings import Findings


def with_one_prefix(adapters: Sequence[Member], findings: Findings) -> list[Member]:
    """Return the adapters with the prefix of the first that has the same modules; note each."""
    found: list[Member] = []
    known: set[str] = set()
    for member in adapters:
        own = {update.module for update in member.adapter.updates}
        change = None if own & known else _change(own, known)
        if change is not None:
            old, new = change
            findings.note(
                f"{member.model.label} names its modules {_shown(old)} and the others "
                f"{_shown(new)}: they are taken for the same"
            )
            member = replace(member, prefix=change)  # noqa: PLW2901
        found.append(member)
        known |= {member.renamed(name) for name in own}
    return found


def _change(own: set[str], known: Iterable[str]) -> tuple[str, str] | None:
    """Return the prefix to remove and the one to add that make most modules the same."""
    ends = {end: name for name in known for end in _ends(name)}
    added = {ends[name].removesuffix(name) for name in own if name in ends}
    if len(added) == 1 and 2 * sum(name in ends for name in own) >= len(own):
        return "", added.pop()
    others = set(known)
    removed = {_lead(name, others) for name in own} - {""}
    if len(removed) == 1:
        lead = removed.pop()
        if 2 * sum(name.removeprefix(lead) in others for name in own) >= len(own):
            return lead, ""
    return None


def _lead(name: str, others: set[str]) -> str:
    return next((name.removesuffix(end) for end in _ends(name) if end in others), "")


def _ends(name: str) -> Iterable[str]:
    """Yield what follows each dot but the first part of which is a layer's number."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        if parts[i].isdigit():
            return
        yield ".".join(parts[i:])


def _shown(prefix: str) -> str:
    return f"with {prefix.removesuffix('.')!r} in front" if prefix else "without that"
