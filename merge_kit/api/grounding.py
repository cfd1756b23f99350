"""Changes of adapters inside sums: what they are of, and how to have them without rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from merge_kit.api.adapter_changes import stand_alone
from merge_kit.api.changes import Difference, Sum, differences
from merge_kit.api.held import HeldModel
from merge_kit.api.overlays import Applied, OnlyChange, is_below, on_top
from merge_kit.api.requests import Node
from merge_kit.errors import UsageError


def grounded(sums: Sequence[Sum], models: Sequence[Node] = ()) -> list[Sum]:
    """Return sums in which every adapter is on top of the base of everything else.

    The base is the one model that sums are added to, or else that of the other differences. Where
    there is none, the changes of the adapters stand alone.

    Raises:
        UsageError: If there are several bases, or it is the result of a merge.
        MismatchError: If an adapter does not fit the base, or the other adapters.
    """
    leaves = [leaf for terms in sums for leaf in differences(terms)]
    adapters = [leaf.model for leaf in leaves if _is_adapter(leaf)]
    if not adapters:
        return list(sums)
    others = [leaf.base for leaf in leaves if leaf.base is not None]
    bases = {node.key: node for node in (models if len(models) == 1 else (*models, *others))}
    if bases:
        base = _one(list(bases.values()), adapters[0])
        return [_each(terms, lambda leaf: _of_base(leaf, base)) for terms in sums]
    alone = stand_alone([node for node in adapters if isinstance(node, HeldModel)])

    def stands_alone(leaf: Difference) -> Difference:
        if not isinstance(leaf.model, HeldModel) or not _is_adapter(leaf):
            return leaf
        return Difference(HeldModel(alone[leaf.model.key]), None)

    return [_each(terms, stands_alone) for terms in sums]


def exact(terms: Sum) -> Sum:
    """Return a sum with the changes of adapters in place of what they make of a base, minus it."""
    return _each(terms, _only_change)


def _is_adapter(leaf: Difference) -> bool:
    return (
        leaf.base is None
        and isinstance(leaf.model, HeldModel)
        and leaf.model.model.adapter is not None
    )


def _one(bases: Sequence[Node], adapter: Node) -> HeldModel:
    hint = "name its base: mk.TaskVector(mk.load(base).with_adapter(adapter), base)"
    if len(bases) > 1:
        problem = f"found {len(bases)} models that {adapter} could be an adapter of, expected one"
        raise UsageError(problem, hint=hint)
    if not isinstance(bases[0], HeldModel):
        problem = f"{bases[0]} has no tensors yet that {adapter} could be added to"
        raise UsageError(problem, hint="save it, and load what is saved")
    return bases[0]


def _of_base(leaf: Difference, base: HeldModel) -> Difference:
    if not isinstance(leaf.model, HeldModel) or not _is_adapter(leaf):
        return leaf
    return Difference(HeldModel(on_top(base, [Applied(leaf.model, 1.0)])), base)


def _only_change(leaf: Difference) -> Difference:
    model, base = leaf.model, leaf.base
    if not isinstance(model, HeldModel) or not isinstance(base, HeldModel):
        return leaf
    return Difference(HeldModel(OnlyChange(model, base)), None) if is_below(base, model) else leaf


def _each(terms: Sum, change: Callable[[Difference], Difference]) -> Sum:
    """Return a sum with every difference replaced, those inside pruned sums too."""
    return tuple(
        (weight, change(one))
        if isinstance(one, Difference)
        else (weight, replace(one, terms=_each(one.terms, change)))
        for weight, one in terms
    )
