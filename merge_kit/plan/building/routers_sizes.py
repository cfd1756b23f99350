"""Sizes in the config of a base that prompts run through: those of its weights, or refused.

A library that builds the model, or reads its tokenizer, takes memory and time by what config.json
says, before any weight is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from merge_kit.architecture.sections import is_int
from merge_kit.errors import MismatchError
from merge_kit.plan.models import Model

_QUERIES, _KEYS = "self_attn.q_proj.weight", "self_attn.k_proj.weight"
_ROPE = ("rope_parameters", "rope_scaling")


def size_errors(base: Model, hidden: int) -> Iterator[MismatchError]:
    """Yield what config.json says of sizes that the weights do not."""
    config, stack = base.config, base.described
    if config is None or stack is None:
        return
    heads: Any = config.get("num_attention_heads")
    told = is_int(heads) and heads > 0
    held = base.by_layer(stack).get(0, {})
    rows = {name: base.specs[held[name]].shape[0] for name in (_QUERIES, _KEYS) if name in held}
    wanted = {"num_hidden_layers": stack.count, "hidden_size": hidden}
    if told and _QUERIES in rows:
        wanted["head_dim"] = head_dim = rows[_QUERIES] // heads
        if _KEYS in rows:
            wanted["num_key_value_heads"] = rows[_KEYS] // max(1, head_dim)
    for key, value in wanted.items():
        found = config.get(key)
        if is_int(found) and found != value:
            problem = f"{key} is {found} in config.json, and {value} by the weights"
            yield MismatchError(problem, where=base.label, hint="repair config.json")
    for part in (config, *(config.get(key) for key in _ROPE)):
        yield from _share(base, part)


def _share(base: Model, part: Any) -> Iterator[MismatchError]:
    """Yield a share of a head that has positions which is none."""
    share = part.get("partial_rotary_factor") if isinstance(part, Mapping) else None
    if isinstance(share, int | float) and not 0 < share <= 1:
        problem = f"partial_rotary_factor is {share} in config.json, expected above 0, at most 1"
        yield MismatchError(problem, where=base.label, hint="repair config.json")
