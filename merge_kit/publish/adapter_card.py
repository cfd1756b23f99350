"""What the card of an adapter says beside that of a model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from merge_kit.methods.registry import find
from merge_kit.plan.describe_adapters import adapter_lines, largest, residuals
from merge_kit.plan.values import Plan
from merge_kit.publish.markdown import code, table

_SHOWN = 20
"""Modules in the table of residuals."""

_CONFIG = "adapter_config.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def is_adapter(plan: Plan) -> bool:
    """Return whether adapters are made."""
    return find(plan.method).makes == "adapter"


def adapter_bases(plan: Plan) -> list[str]:
    """Return the base model that the configs name, if it is a Hub id."""
    found: dict[str, None] = {}
    for file in plan.side_files:
        if file.name.rpartition("/")[2] == _CONFIG and file.text is not None:
            named = json.loads(file.text).get("base_model_name_or_path")
            if isinstance(named, str) and _HUB_ID.fullmatch(named):
                found.setdefault(named)
    return list(found)


def rank_lines(plan: Plan, facts: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the ranks, and a table of the modules whose factors miss most of their change.

    Args:
        facts: See `Report.facts`.
    """
    lines = [f"- {line}" for line in adapter_lines(plan)]
    found = residuals(facts)
    if not found:
        return lines
    ranks = {one.key: one.rank for one in plan.ranks}
    rows = [
        [code(one.key), str(ranks.get(one.key, "")), f"{one.norm:.4g}", f"{one.relative:.2%}"]
        for one in largest(found, _SHOWN)
    ]
    head = ["module", "rank", "norm of the change", "missed"]
    said = f"What the factors miss of a change, by its Frobenius norm, for {len(found):,} modules"
    shown = f" (the {_SHOWN} that miss most)" if len(found) > _SHOWN else ""
    return [*lines, "", f"{said}{shown}:", "", *table(head, rows)]
