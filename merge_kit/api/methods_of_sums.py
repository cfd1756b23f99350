"""Sums of models and task vectors that a method of recipes computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from merge_kit.api.changes import Change, Difference, Prune, Sum
from merge_kit.api.requests import Node, Request

Models = Sequence[tuple[float, Node]]


def request(models: Models, tasks: Sum) -> Request | None:
    """Return a sum as the method that computes it, or None if no method does."""
    return _task_request(models, tasks) or _linear_request(models, tasks)


def _task_request(models: Models, tasks: Sum) -> Request | None:
    """Return one model plus task vectors that have it as their base as a method, or None."""
    if len(models) != 1 or models[0][0] != 1.0 or not tasks:
        return None
    base = models[0][1]
    rows = [_task(weight, change) for weight, change in tasks]
    found = [row for row in rows if row is not None and _has_base(row[1], base)]
    nodes = tuple(leaf.model for _, leaf, _ in found)
    if len(found) < len(tasks) or len({node.key for node in nodes}) < len(nodes):
        return None
    named = _method([prune for _, _, prune in found])
    if named is None:
        return None
    method, parameters, seed = named
    own = tuple(_own(weight, prune) for weight, _, prune in found)
    return Request(method, nodes, base, own, parameters, seed)


def _linear_request(models: Models, tasks: Sum) -> Request | None:
    """Return a sum of models and unpruned differences as `linear`, or None."""
    found = {node.key: (weight, node) for weight, node in models}
    for weight, change in tasks:
        if not isinstance(change, Difference) or change.base is None:
            return None
        for factor, node in ((weight, change.model), (-weight, change.base)):
            known = found[node.key][0] if node.key in found else 0.0
            found[node.key] = known + factor, node
    own = tuple({"weight": weight} for weight, _ in found.values())
    nodes = tuple(node for _, node in found.values())
    return Request("linear", nodes, None, own, {"normalize": False})


def _task(weight: float, change: Change) -> tuple[float, Difference, Prune | None] | None:
    """Return a difference, or what pruning keeps of one, or None for anything else."""
    if isinstance(change, Difference):
        return weight, change, None
    if len(change.terms) != 1:
        return None
    factor, inner = change.terms[0]
    if factor != 1.0 or not isinstance(inner, Difference):
        return None
    return weight, inner, change.prune


def _has_base(leaf: Difference, base: Node) -> bool:
    return leaf.base is not None and leaf.base.key == base.key


def _own(weight: float, prune: Prune | None) -> dict[str, Any]:
    return {"weight": weight} if prune is None else {"weight": weight, "density": prune.density}


def _method(
    prunes: Sequence[Prune | None],
) -> tuple[str, dict[str, Any], int | None] | None:
    """Return the method that prunes so, its parameters, and the seed."""
    chosen = [prune for prune in prunes if prune is not None]
    if not chosen:
        return "task_arithmetic", {}, None
    if len({(one.how, one.scope, one.seed) for one in chosen}) > 1:
        return None
    first = chosen[0]
    if first.how == "random":
        in_place = all(one is None or one.position == i for i, one in enumerate(prunes))
        return ("dare_linear", {}, first.seed) if in_place else None
    return "magnitude", {"scope": first.scope}, None
