"""`parameters:` at every level -> settings, checked against the methods that will read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from merge_kit.core.names import nearest
from merge_kit.methods.base import MergeMethod
from merge_kit.methods.registry import every_parameter, parameters
from merge_kit.methods.structures import Listed
from merge_kit.recipe.findings import Findings
from merge_kit.recipe.keys import DEAD_KEYS, DIALECT_PARAMETERS, PROMPT_KEYS, SETTING_KEYS
from merge_kit.recipe.lookup import EXPECTED, converted
from merge_kit.recipe.nodes import Node
from merge_kit.recipe.values import NO_PARAMETERS, Parameters, Rule, Scalar, Setting

_EXAMPLES: Mapping[type, str] = {
    float: "write a number such as 0.5",
    int: "write a number such as 8, without a fraction",
    bool: "write true or false",
}
_QUOTE = "put it in quotes"
_LIST = "write a value, a list of values, or a list of {filter, value}"


@dataclass(frozen=True, slots=True)
class Scope:
    """What the readers of one document share.

    Attributes:
        folder: Where relative paths are looked up first.
        methods: The methods that may read parameters here; none if a method's name is wrong,
            and then parameters are not checked against methods.
    """

    findings: Findings
    folder: Path | None
    methods: tuple[type[MergeMethod], ...]


def read_parameters(scope: Scope, node: Node | None, *, of_model: bool = False) -> Parameters:
    """Return the settings of a `parameters` mapping; what is wrong goes to the findings.

    Args:
        scope: The document's readers.
        node: The mapping, None where there is none.
        of_model: Whether the mapping stands under a model or a source.
    """
    if node is None:
        return NO_PARAMETERS
    found = {}
    for name, value in scope.findings.mapping(node).items():
        if name in DEAD_KEYS:
            scope.findings.note(value.key, f"{name} has no effect ({DEAD_KEYS[name]})")
            continue
        rules = _rules(scope.findings, value, _kind(scope, name, value, of_model=of_model))
        if rules:
            found[name] = Setting(rules, value.mark)
    return MappingProxyType(found)


def _kind(scope: Scope, name: str, node: Node, *, of_model: bool) -> type | None:
    """Return the type of a parameter, None where nothing reads it; say so once."""
    if not scope.methods:
        return None
    readers = [p for method in scope.methods for p in parameters(method) if p.name == name]
    if not readers:
        _unread(scope, name, node)
        return None
    if of_model and not any(p.per_model for p in readers):
        place = "parameters of the recipe, a module or a slice"
        scope.findings.note(node.key, f"{name} has no effect under a model (write it in {place})")
    return readers[0].kind


_INSTEAD = {
    ("weight", "passthrough"): "; of an adapter, write lora: [{path: ADAPTER, weight: 0.5}] in "
    "the model's reference; of a tensor, write scale",
}


def _unread(scope: Scope, name: str, node: Node) -> None:
    methods = " or ".join(sorted({method.method_name for method in scope.methods}))
    known = every_parameter() | DIALECT_PARAMETERS
    if name in known:
        instead = _INSTEAD.get((name, methods), "")
        scope.findings.note(node.key, f"{name} has no effect with {methods}{instead}")
        return
    if name in PROMPT_KEYS:
        hint = f"write {name} beside model, not under parameters"
        scope.findings.error(node.key, f"{name} is no parameter", hint)
        return
    hint = nearest(name, known)
    if not hint.startswith("did"):
        hint = nearest(name, _names(scope.methods)) or f"{methods} has no parameters"
    scope.findings.error(node.key, f"{methods} has no parameter {name!r}", hint)


def _names(methods: tuple[type[MergeMethod], ...]) -> set[str]:
    return {p.name for method in methods for p in parameters(method)}


def _rules(findings: Findings, node: Node, kind: type | None) -> tuple[Rule, ...]:
    """Return the rules of one setting; none for an empty list, which means "not set"."""
    if kind is Listed:
        values = _listed(findings, node)
        return (Rule(values),) if values else ()
    match node.content:
        case Mapping():
            rule = _rule(findings, node, kind)
            return (rule,) if rule else ()
        case tuple() as items if items and isinstance(items[0].content, Mapping):
            rules = [_rule(findings, item, kind) for item in items]
            return tuple(rule for rule in rules if rule)
        case tuple() as items if not items:
            return ()
        case _:
            values = _values(findings, node, kind)
            return (Rule(values),) if values else ()


def _listed(findings: Findings, node: Node) -> tuple[Scalar, ...]:
    """Return whole numbers, or one word."""
    if isinstance(node.content, str):
        word = findings.text(node)
        return (word,) if word is not None else ()
    items = node.content if isinstance(node.content, tuple) else (node,)
    if not items:
        findings.wrong(node, EXPECTED[Listed], "leave it out")
    numbers = [findings.whole(item) for item in items]
    return tuple(number for number in numbers if number is not None)


def _rule(findings: Findings, node: Node, kind: type | None) -> Rule | None:
    if not isinstance(node.content, Mapping):
        findings.wrong(node, "{filter, value} like the first entry", _LIST)
        return None
    hints = dict.fromkeys(node.content, "write {filter: NAME, value: ...}")
    entries = findings.fields(node, SETTING_KEYS, ("value",), hints)
    part = entries["filter"].content if "filter" in entries else None
    if part is not None and not isinstance(part, str):
        findings.wrong(entries["filter"], "part of a tensor's name", _QUOTE)
        return None
    values = _values(findings, entries["value"], kind) if "value" in entries else ()
    return Rule(values, part) if values else None


def _values(findings: Findings, node: Node, kind: type | None) -> tuple[Scalar, ...]:
    """Return a value, or the anchors of a gradient."""
    anchors = node.content if isinstance(node.content, tuple) else (node,)
    if not anchors:
        findings.wrong(node, "at least one value", "remove the key to leave it unset")
    values = [_scalar(findings, anchor, kind) for anchor in anchors]
    return tuple(value for value in values if value is not None)


def _scalar(findings: Findings, node: Node, kind: type | None) -> Scalar | None:
    expected = EXPECTED[kind] if kind else "a number, true, false or text"
    if node.content is None or isinstance(node.content, tuple | Mapping):
        hint = "remove the key to leave it unset" if node.content is None else _LIST
        findings.wrong(node, expected, hint)
        return None
    is_text = kind is None and isinstance(node.content, str)
    value = node.content if is_text else converted(node.content, kind or float)
    if value is None:
        findings.wrong(node, expected, _value_hint(node.content, kind))
    return value


def _value_hint(value: Scalar, kind: type | None) -> str:
    if kind is str:
        return _QUOTE
    if isinstance(value, str) and value.strip().endswith("%"):
        return "a share is a number between 0 and 1"
    return _EXAMPLES.get(kind or str, "")
