"""`uses:` -> adapters that are made at once, each with its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping

from merge_kit.recipe.lookup import converted
from merge_kit.recipe.nodes import Node
from merge_kit.recipe.settings import Scope

USE_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,98}[A-Za-z0-9_-])?"
"""What a folder may be called on every system."""

MAX_USES = 1000
_NAME = re.compile(USE_NAME)
_TAKEN = ("readme.md", "merge_kit.json")

Uses = tuple[tuple[str, tuple[float, ...]], ...]


def read_uses(scope: Scope, fields: Mapping[str, Node], models: int) -> Uses:
    """Return the folders and weights of `uses`; what is wrong goes to the findings.

    Args:
        scope: The document's readers.
        fields: The document's keys.
        models: How many models it lists.
    """
    node, findings = fields.get("uses"), scope.findings
    if node is None:
        return ()
    if any(method.makes != "adapter" or not _is_weighted(method) for method in scope.methods):
        named = " or ".join(sorted(method.method_name for method in scope.methods))
        hint = "uses is for methods that combine adapters, lora_concat for one"
        findings.error(node.key, f"uses has no meaning with {named}", hint)
        return ()
    entries = findings.mapping(node)
    if isinstance(node.content, Mapping) and not 0 < len(entries) <= MAX_USES:
        expected = f"1 to {MAX_USES} adapters to make"
        findings.wrong(node, expected, "write uses: {NAME: [1, 0.5]}, a weight for each model")
        return ()
    _refuse_weights(scope, fields)
    _refuse_names(scope, entries)
    found = []
    for name, weights in entries.items():
        items = findings.items(weights)
        if len(items) != models and isinstance(weights.content, tuple):
            findings.wrong(weights, f"{models} weights, one for each model")
        found.append((name, tuple(_number(scope, item) for item in items)))
    return tuple(found)


def _is_weighted(method: type) -> bool:
    return "weight" in getattr(method, "__dataclass_fields__", {})


def _number(scope: Scope, node: Node) -> float:
    content = node.content
    number = converted(content, float) if isinstance(content, str | int | float) else None
    if isinstance(number, bool | str) or number is None:
        scope.findings.wrong(node, "a finite number")
        return 0.0
    return float(number)


def _refuse_names(scope: Scope, entries: Mapping[str, Node]) -> None:
    """Refuse what is no name of a folder, or of the same folder on some systems."""
    first: dict[str, str] = {}
    for name, node in entries.items():
        known = first.setdefault(name.lower(), name)
        if not _NAME.fullmatch(name) or name.lower() in _TAKEN:
            hint = "write letters, digits, and _ . - between them"
            scope.findings.error(node.key, f"{name[:100]!r} is no name for a folder", hint)
        elif known is not name:
            problem = f"{known!r} and {name!r} are one folder on some systems"
            scope.findings.error(node.key, problem, "give them different names")


def _refuse_weights(scope: Scope, fields: Mapping[str, Node]) -> None:
    """Refuse weights in parameters, which uses would overrule."""
    given = [fields["parameters"]] if "parameters" in fields else []
    models = fields["models"].content if "models" in fields else ()
    entries = [e.content for e in models] if isinstance(models, tuple) else []
    given += [e["parameters"] for e in entries if isinstance(e, Mapping) and "parameters" in e]
    for node in given:
        content = node.content
        if isinstance(content, Mapping) and "weight" in content:
            hint = "remove it: the lists under uses hold the weights"
            scope.findings.error(content["weight"].key, "found weight beside uses", hint)
