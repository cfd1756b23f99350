"""One document of a recipe -> a stage, and what it says about the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from merge_kit.core.dtypes import RECIPE_DTYPES
from merge_kit.errors import PlanError
from merge_kit.methods.base import MergeMethod
from merge_kit.methods.registry import find, parameters
from merge_kit.recipe.entries import (
    read_experts,
    read_method,
    read_model,
    read_modules,
    read_shared_experts,
    read_slices,
    slice_methods,
)
from merge_kit.recipe.experts import lowered
from merge_kit.recipe.findings import Findings
from merge_kit.recipe.keys import CONFLICT_POLICIES, OUTPUT_KEYS, RECIPE_KEYS, TOKENIZER_KEYS
from merge_kit.recipe.nodes import Node
from merge_kit.recipe.prompts import check_experts
from merge_kit.recipe.settings import Scope, read_parameters
from merge_kit.recipe.tensor_rules import read_rules
from merge_kit.recipe.uses import read_uses
from merge_kit.recipe.values import Entry, Stage, TensorRule, TokenizerChoice

Fields = Mapping[str, Node]

_DTYPE_NAMES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "fp64": "float64",
    "f64": "float64",
    "double": "float64",
}
_OF_EXPERTS = dict.fromkeys(
    ("experts", "gate_mode", "experts_per_token"),
    "a recipe of mergekit-moe has no merge_method; beside one, write models and parameters",
)
_SHAPES = ("models", "slices", "modules")


@dataclass(frozen=True, slots=True)
class Document:
    """A stage as read, before the documents are put in order.

    Attributes:
        output: The nodes of `seed`, `shard_size` and `output`.
        name: The node of `name`, or None.
    """

    stage: Stage
    output: Fields
    name: Node | None


def read_document(node: Node, folder: Path | None, findings: Findings) -> Document:
    """Return what a document says; what is wrong goes to the findings."""
    node = lowered(node, findings)
    fields = findings.fields(node, RECIPE_KEYS, hints=_misplaced(node))
    _check_shape(findings, node, fields)
    method = _method_name(fields)
    scope = Scope(findings, folder, _methods(fields, method))
    if "merge_method" in fields:
        read_method(scope, fields["merge_method"])
    if "chat_template" in fields:
        hint = "remove it: the output takes the chat template of the base as it is"
        findings.error(fields["chat_template"].key, "chat_template is not supported yet", hint)
    models, rules = (
        read_experts(scope, fields.get("models")),
        read_rules(scope, fields.get("tensors")),
    )
    _check_rules(findings, fields, models, rules)
    stage = Stage(
        merge_method=method,
        mark=node.mark,
        name=_name(findings, fields.get("name")),
        base_model=read_model(scope, fields.get("base_model")),
        models=models,
        slices=read_slices(scope, fields.get("slices")),
        modules=read_modules(scope, fields.get("modules")),
        tensors=rules,
        parameters=read_parameters(_above_slices(scope, fields), fields.get("parameters")),
        dtype=_dtype(findings, fields.get("dtype")),
        out_dtype=_dtype(findings, fields.get("out_dtype")),
        tokenizer=_tokenizer(scope, fields),
        on_conflict=_on_conflict(findings, fields.get("on_conflict")),
        uses=read_uses(scope, fields, len(models)),
        shared_experts=read_shared_experts(scope, fields.get("shared_experts")),
    )
    if method == "sparse_upcycle":
        check_experts(findings, stage, fields.get("parameters"))
    output = {key: fields[key] for key in OUTPUT_KEYS if key in fields}
    return Document(stage, output, fields.get("name"))


def _misplaced(node: Node) -> Mapping[str, str]:
    """Return what to say of keys that have their place elsewhere: parameters of the method."""
    named = node.content.get("merge_method") if isinstance(node.content, Mapping) else None
    try:
        method = find(str(named.content)) if named is not None else None
    except PlanError:  # reported where the name stands
        method = None
    own = [p.name for p in parameters(method)] if method is not None else []
    return _OF_EXPERTS | {name: f"write it under parameters: {{{name}: ...}}" for name in own}


def _full(fields: Fields) -> list[str]:
    return [key for key in _SHAPES if key in fields and not fields[key].is_empty]


def _has_rules(fields: Fields) -> bool:
    return "tensors" in fields and not fields["tensors"].is_empty


def _check_shape(findings: Findings, node: Node, fields: Fields) -> None:
    """Refuse a document without a method, or without exactly one of models, slices, modules."""
    full, has_rules = _full(fields), _has_rules(fields)
    if not isinstance(node.content, Mapping):
        return
    if "merge_method" not in fields and (full or not has_rules):
        findings.error(
            node.mark, "merge_method is missing", "write for example merge_method: linear"
        )
    if not full and not has_rules and not _builds_of_base(fields):
        findings.error(node.mark, *_no_models(fields))
    if len(full) > 1:
        problem = f"found {' and '.join(full)}, expected only one of models, slices and modules"
        findings.error(fields[full[1]].key, problem, "use documents with names to do both")
    if has_rules and "base_model" not in fields:
        hint = "name the model whose tensors these are"
        findings.error(fields["tensors"].key, "tensors needs a base_model", hint)


def _builds_of_base(fields: Fields) -> bool:
    """Return whether a method builds a model of the base alone."""
    return "base_model" in fields and _builds(fields) is not None


def _builds(fields: Fields) -> type[MergeMethod] | None:
    """Return a method that builds a model of another structure, None if it is another one."""
    try:
        method = find(_method_name(fields))
    except PlanError:  # reported where the name stands
        return None
    return method if method.makes == "structure" else None


def _no_models(fields: Fields) -> tuple[str, str]:
    """Return problem and hint for a document that names nothing to work on."""
    method = _builds(fields)
    if method is None:
        problem = "found no models, slices or modules, expected one of them"
        return problem, "write for example models: [{model: NAME}]"
    if method.min_inputs == 0 or not method.takes_base:
        problem = "found neither models nor a base_model, expected one of them"
        return problem, "write base_model: NAME, or models: [{model: NAME}]"
    return "found no models, expected one", "write models: [{model: NAME}]"


def _rules(fields: Fields) -> list[Fields]:
    """Return the rules of `tensors` as they are written, without what is no mapping."""
    content = fields["tensors"].content if "tensors" in fields else ()
    rules = [rule.content for rule in content] if isinstance(content, tuple) else []
    return [rule for rule in rules if isinstance(rule, Mapping)]


def _method_name(fields: Fields) -> str:
    """Return the stage's method; with `tensors` alone, the one that its rules inherit."""
    if "merge_method" in fields:
        return str(fields["merge_method"].content)
    inheriting = [rule for rule in _rules(fields) if "merge_method" not in rule]
    return "linear" if any("models" in rule for rule in inheriting) else "passthrough"


def _methods(fields: Fields, stage_method: str) -> tuple[type[MergeMethod], ...]:
    """Return the stage's method and those of its rules; none if one of them is unknown."""
    named = [rule["merge_method"].content for rule in _rules(fields) if "merge_method" in rule]
    names = [stage_method, *(str(name) for name in named if name is not None)]
    try:
        return tuple(find(name) for name in dict.fromkeys(names))
    except PlanError:  # reported where the name stands
        return ()


def _above_slices(scope: Scope, fields: Fields) -> Scope:
    """Return the scope of the recipe's parameters, which every slice of it may read."""
    scope = slice_methods(scope, fields.get("slices"))
    modules = fields["modules"].content if "modules" in fields else None
    for module in modules.values() if isinstance(modules, Mapping) else ():
        if isinstance(module.content, Mapping):
            scope = slice_methods(scope, module.content.get("slices"))
    return scope


def _check_rules(
    findings: Findings, fields: Fields, models: tuple[Entry, ...], rules: tuple[TensorRule, ...]
) -> None:
    """Refuse rules that have nothing to merge."""
    if models or _full(fields):
        return
    for rule in rules:
        if rule.copy is None and not rule.drop and not rule.models:
            problem = f"the rule for {rule.match!r} has nothing to merge"
            findings.error(rule.mark, problem, "give it models, copy or drop")


def _name(findings: Findings, node: Node | None) -> str | None:
    name = findings.text(node) if node is not None else None
    if node is not None and name is not None and set(name) & set("+@"):
        findings.wrong(node, "a name without + and @", "other documents refer to it by this name")
    return name


def _dtype(findings: Findings, node: Node | None) -> str | None:
    """Return the dtype as headers name it, None where it is not given or wrong."""
    if node is None:
        return None
    name = str(node.content).removeprefix("torch.")
    if isinstance(node.content, str) and name in RECIPE_DTYPES:
        return RECIPE_DTYPES[name]
    right = _DTYPE_NAMES.get(name.lower(), name.lower())
    hint = f"did you mean {right!r}?" if right in RECIPE_DTYPES else ""
    findings.wrong(node, ", ".join(RECIPE_DTYPES), hint)
    return None


def _tokenizer(scope: Scope, fields: Fields) -> TokenizerChoice | None:
    short, long = fields.get("tokenizer_source"), fields.get("tokenizer")
    if short is not None and long is not None:
        hint = "keep one of the two"
        problem = "found both tokenizer and tokenizer_source, expected only one"
        scope.findings.error(max(short.key, long.key, key=_position), problem, hint)
    if long is not None:
        return _tokenizer_mapping(scope, long)
    return _tokenizer_source(scope, short) if short is not None else None


def _position(mark: object) -> tuple[int, int]:
    return getattr(mark, "line", 0), getattr(mark, "column", 0)


def _tokenizer_mapping(scope: Scope, node: Node) -> TokenizerChoice | None:
    if isinstance(node.content, str):
        scope.findings.wrong(node, "a mapping", f"write tokenizer: {{source: {node.content}}}")
        return None
    fields = scope.findings.fields(node, TOKENIZER_KEYS)
    for key in ("tokens", "pad_to_multiple_of"):
        if key in fields:
            hint = "remove it: vocabularies are not changed yet"
            scope.findings.error(fields[key].key, f"tokenizer.{key} is not supported yet", hint)
    if "source" in fields:
        return _tokenizer_source(scope, fields["source"])
    return TokenizerChoice("union", node.mark)


def _tokenizer_source(scope: Scope, node: Node) -> TokenizerChoice | None:
    kinds: tuple[Literal["base"], Literal["union"]] = ("base", "union")
    for kind in kinds:
        if node.content == kind:
            return TokenizerChoice(kind, node.mark)
    model = read_model(scope, node)
    return TokenizerChoice(model, node.mark) if model is not None else None


def _on_conflict(findings: Findings, node: Node | None) -> Literal["error", "base", "first"]:
    found = findings.choice(node, CONFLICT_POLICIES) if node is not None else None
    return found or "error"
