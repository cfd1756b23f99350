"""`tensors:` -> ordered rules for single tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from merge_kit.recipe.entries import read_method, read_model, read_models
from merge_kit.recipe.keys import RULE_KEYS
from merge_kit.recipe.nodes import Node
from merge_kit.recipe.settings import Scope, read_parameters
from merge_kit.recipe.values import TensorRule


def read_rules(scope: Scope, node: Node | None) -> tuple[TensorRule, ...]:
    """Return the rules of `tensors`, in their order; scope.methods[0] is the recipe's method."""
    if node is None:
        return ()
    rules = [_tensor_rule(scope, item) for item in scope.findings.items(node)]
    return tuple(rule for rule in rules if rule is not None)


def _tensor_rule(scope: Scope, node: Node) -> TensorRule | None:
    fields = scope.findings.fields(node, RULE_KEYS, ("match",))
    _check_action(scope, node, fields)
    match = scope.findings.text(fields["match"]) if "match" in fields else None
    method = None
    own = replace(scope, methods=scope.methods[:1])
    if "merge_method" in fields:
        method = read_method(scope, fields["merge_method"])
        own = replace(scope, methods=(method,) if method else ())
    drop = "drop" in fields and fields["drop"].content is True
    if "drop" in fields and not drop:
        scope.findings.wrong(fields["drop"], "true", "remove the rule to keep the tensors")
    parameters = read_parameters(own, fields.get("parameters"))
    models = read_models(own, fields.get("models")) or None
    copy = read_model(scope, fields.get("copy"))
    if match is None:
        return None
    name = method.method_name if method else None
    return TensorRule(match, node.mark, name, parameters, models, copy, drop)


def _check_action(scope: Scope, node: Node, fields: Mapping[str, Node]) -> None:
    """Refuse a rule that both copies or drops and does something else."""
    merging = ("merge_method", "parameters", "models")
    found = [key for key in ("copy", "drop", *merging) if key in fields]
    if len(found) > 1 and found[0] in ("copy", "drop"):
        problem = f"{node.name} has {' and '.join(found)}, which exclude one another"
        hint = "a rule merges, or copies from one model, or drops"
        scope.findings.error(fields[found[1]].key, problem, hint)
