"""Experts that a model stores apart, where an adapter changes all of them as one tensor."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from merge_kit.plan.applying.changes import Lie

Pieces = tuple[tuple[str, ...], ...]
"""For each expert the tensors whose rows, one after the other, are its part of the fused one."""

_EXPERT = re.compile(r"(.*(?:^|\.)experts)\.(0|[1-9][0-9]{0,5})\.(\w+)\.weight")
_FUSED = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""Names of fused tensors, and of what they are made of."""


def fused_experts(names: Iterable[str]) -> Mapping[str, Pieces]:
    """Return the fused tensors that experts stored apart would make, by their name.

    Those are left out that a model stores fused, or whose experts are not numbered from 0 on.
    """
    names = set(names)
    modules: dict[str, dict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    for name in names:
        found = _EXPERT.fullmatch(name)
        if found is not None:
            modules[found[1]][found[3]][int(found[2])] = name
    fused: dict[str, Pieces] = {}
    for module, parts in modules.items():
        count = max(len(experts) for experts in parts.values())
        for name, spellings in _FUSED.items():
            for spelling in spellings:
                complete = all(set(parts.get(p, ())) == set(range(count)) for p in spelling)
                if complete and f"{module}.{name}" not in names:
                    rows = (tuple(parts[part][i] for part in spelling) for i in range(count))
                    fused.setdefault(f"{module}.{name}", tuple(rows))
    return fused


def expert_lie(fused: str, shapes: Mapping[str, tuple[int, ...]]) -> Lie | None:
    """Return whether fused experts have their outputs first or last, None if nothing tells.

    The two tensors of a module tell: with a width of h and i hidden units, they are (experts,
    2 i, h) and (experts, h, i), or (experts, h, 2 i) and (experts, i, h).

    Args:
        fused: Name of one of them.
        shapes: Of the model's tensors.
    """
    module, _, _ = fused.rpartition(".")
    up, down = shapes.get(f"{module}.gate_up_proj"), shapes.get(f"{module}.down_proj")
    if up is None or down is None or len(up) != 3 or len(down) != 3:
        return None
    if up[1] == 2 * down[2] and up[2] == down[1]:
        return "straight"
    if up[2] == 2 * down[1] and up[1] == down[2]:
        return "transposed"
    return None
