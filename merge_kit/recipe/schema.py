"""The recipe language as a JSON Schema, for editors that complete and check YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merge_kit.core.dtypes import RECIPE_DTYPES
from merge_kit.methods.registry import find, names, parameters
from merge_kit.recipe import keys
from merge_kit.recipe.experts import ARCHITECTURES, GATE_MODES, SIGNS
from merge_kit.recipe.nodes import MAX_WHOLE
from merge_kit.recipe.prompts import MAX_BYTES, MAX_PROMPTS
from merge_kit.recipe.uses import USE_NAME

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string", "minLength": 1}
_SCALAR: Schema = {"type": ["number", "boolean", "string"]}
_GRADIENT: Schema = {"type": "array", "items": _SCALAR, "minItems": 1}
_WHOLE: Schema = {"type": ["integer", "string"], "minimum": 0, "pattern": r"^\s*\d+\s*$"}
_ANYTHING: Schema = {}


def recipe_schema() -> Schema:
    """Return the schema (2020-12) of one document, with the methods that are installed."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "merge_kit recipe",
        "description": "One document of a recipe that merges models.",
        "type": "object",
        "if": {
            "not": {"required": ["merge_method"]},
            "anyOf": [{"required": [key]} for key in SIGNS],
        },
        "then": _ref("of_experts"),
        "else": {
            **_record(keys.RECIPE_KEYS, _top(), ()),
            "anyOf": [{"required": ["merge_method"]}, {"required": ["tensors", "base_model"]}],
        },
        "$defs": {**_definitions(), **_definitions_of_experts()},
    }


def _record(described: Mapping[str, str], shapes: Schema, required: Sequence[str]) -> Schema:
    """Return an object schema: every described key has a shape, null means not given."""
    properties = {
        key: {"description": text, **_optional(shapes[key], is_required=key in required)}
        for key, text in described.items()
    }
    for key, why in keys.DEAD_KEYS.items():
        properties[key] = {"description": f"No effect: {why}.", "deprecated": True}
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _optional(shape: Schema, *, is_required: bool) -> Schema:
    return shape if is_required or not shape else {"anyOf": [shape, {"type": "null"}]}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _list_of(name: str) -> Schema:
    return {"type": "array", "items": _ref(name)}


def _top() -> Schema:
    dtypes = [prefix + name for prefix in ("", "torch.") for name in RECIPE_DTYPES]
    return {
        "merge_method": {"enum": list(names())},
        "base_model": _ref("reference"),
        "models": _list_of("expert"),
        "shared_experts": {**_list_of("shared_expert"), "maxItems": 1},
        "slices": _list_of("slice"),
        "modules": {"type": "object", "additionalProperties": _ref("module")},
        "tensors": _list_of("rule"),
        "parameters": _ref("parameters"),
        "dtype": {"enum": dtypes},
        "out_dtype": {"enum": dtypes},
        "tokenizer_source": {"anyOf": [{"enum": ["base", "union"]}, _ref("reference")]},
        "tokenizer": _ref("tokenizer"),
        "chat_template": {"type": "null"},
        "name": {**_TEXT, "pattern": "^[^+@]*$"},
        "on_conflict": {"enum": list(keys.CONFLICT_POLICIES)},
        "uses": {
            "type": "object",
            "minProperties": 1,
            "propertyNames": {"pattern": f"^{USE_NAME}$"},
            "additionalProperties": {"type": "array", "items": {"type": ["number", "string"]}},
        },
        "seed": {**_WHOLE, "maximum": MAX_WHOLE},
        "shard_size": {"type": ["string", "integer"], "minimum": 1},
        "output": _TEXT,
    }


def _definitions() -> Schema:
    model, given = _ref("reference"), _ref("parameters")
    models, slices = _list_of("entry"), _list_of("slice")
    entry: Schema = {"model": model, "parameters": given}
    source: Schema = {**entry, "layer_range": _ref("layer_range"), "layers": _ref("layers")}
    piece: Schema = {
        "sources": _list_of("source"),
        "merge_method": {"enum": _slice_methods()},
        "base_model": model,
        "parameters": given,
    }
    module: Schema = {"models": models, "slices": slices, "parameters": given}
    rule: Schema = {
        "match": _TEXT,
        "merge_method": {"enum": list(names())},
        "parameters": given,
        "models": models,
        "copy": model,
        "drop": {"const": True},
    }
    tokenizer: Schema = {
        "source": {"anyOf": [{"enum": ["base", "union"]}, model]},
        "tokens": {"type": "null"},
        "pad_to_multiple_of": {"type": "null"},
    }
    return {
        "entry": _record(keys.ENTRY_KEYS, entry, ("model",)),
        "source": {
            **_record(keys.SOURCE_KEYS, source, ("model",)),
            "oneOf": [_given("layer_range"), _given("layers")],
        },
        "slice": _record(keys.SLICE_KEYS, piece, ("sources",)),
        "module": _record(keys.MODULE_KEYS, module, ()),
        "rule": _record(keys.RULE_KEYS, rule, ("match",)),
        "tokenizer": _record(keys.TOKENIZER_KEYS, tokenizer, ()),
        "layer_range": {"type": "array", "items": _WHOLE, "minItems": 2, "maxItems": 2},
        "layers": {"type": "array", "items": _WHOLE, "minItems": 1, "uniqueItems": True},
        "reference": _reference(),
        "literal": _literal(),
        "adapter": _adapter(),
        "parameters": _parameters(),
        "setting": _setting(),
        "condition": _record(
            keys.SETTING_KEYS,
            {"value": {"anyOf": [_SCALAR, _GRADIENT]}, "filter": {"type": "string"}},
            ("value",),
        ),
    }


def _definitions_of_experts() -> Schema:
    """Return models that become experts, and the form of a document that mergekit-moe reads."""
    text: Schema = {"type": "string", "pattern": r"^$|\S", "maxLength": MAX_BYTES}
    prompts = {
        key: {"type": "array", "items": text, "maxItems": MAX_PROMPTS} for key in keys.PROMPT_KEYS
    }
    entry: Schema = {"model": _ref("reference"), "parameters": _ref("parameters"), **prompts}
    number: Schema = {"type": ["number", "string"]}
    scales: Schema = {"noise_scale": number, "residual_scale": number}
    source: Schema = {"source_model": _ref("reference")}
    experts, shared = _list_of("moe_expert"), {**_list_of("moe_expert"), "maxItems": 1}
    top: Schema = {
        **_top(),
        "experts": {**experts, "minItems": 1},
        "gate_mode": {"enum": list(GATE_MODES)},
        "experts_per_token": {**_WHOLE, "minimum": 1},
        "shared_experts": shared,
        "architecture": {**_TEXT, "examples": list(ARCHITECTURES)},
    }
    described = {**keys.EXPERT_KEYS, "source_model": "the same as model"}
    return {
        "expert": _record(keys.EXPERT_KEYS, entry, ("model",)),
        "shared_expert": {
            **_record(described, {**entry, **source}, ()),
            "oneOf": [{"required": ["model"]}, {"required": ["source_model"]}],
        },
        "moe_expert": _record(
            keys.MOE_EXPERT_KEYS, {**source, **prompts, **scales}, ("source_model",)
        ),
        "of_experts": _record(keys.MOE_KEYS, top, ("base_model", "experts")),
    }


def _given(key: str) -> Schema:
    """Return a schema of objects in which a key has a value."""
    shape = {"description": keys.SOURCE_KEYS[key], "type": "array"}
    return {"required": [key], "properties": {key: shape}}


def _slice_methods() -> list[str]:
    return [name for name in names() if find(name).makes == "model"]


def _literal() -> Schema:
    path = _record(keys.PATH_KEYS, {"path": _TEXT, "revision": _TEXT}, ("path",))
    return {"anyOf": [_TEXT, path]}


def _adapter() -> Schema:
    shapes: Schema = {"path": _TEXT, "revision": _TEXT, "weight": {"type": ["number", "string"]}}
    return {"anyOf": [_TEXT, _record(keys.ADAPTER_KEYS, shapes, ("path",))]}


def _reference() -> Schema:
    shapes: Schema = {
        "model": _ref("literal"),
        "lora": {"anyOf": [_ref("adapter"), _list_of("adapter")]},
        "override_architecture": _ANYTHING,
    }
    return {"anyOf": [_TEXT, _record(keys.REFERENCE_KEYS, shapes, ("model",))]}


def _setting() -> Schema:
    conditions = _list_of("condition")
    return {"anyOf": [_SCALAR, {"type": "array", "items": _SCALAR}, conditions, _ref("condition")]}


def _parameters() -> Schema:
    """Return the parameters of all methods: which of them read each one, and its type."""
    readers: dict[str, list[str]] = {name: [] for name in keys.DIALECT_PARAMETERS}
    for method in names():
        for parameter in parameters(find(method)):
            readers.setdefault(parameter.name, []).append(method)
    properties: Schema = {
        name: {"description": _read_by(methods), **_ref("setting")}
        for name, methods in sorted(readers.items())
    }
    for key, why in keys.DEAD_KEYS.items():
        properties[key] = {"description": f"No effect: {why}.", "deprecated": True}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _read_by(methods: list[str]) -> str:
    return f"Read by {', '.join(methods)}." if methods else "No effect: no method here reads it."
