"""The recipe language as a JSON Schema, for editors that complete and check YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merge_kit.core.dtypes import RECIPE_DTYPES
from merge_kit.methods.registry import find, names, parameters
from merge_kit.recipe import keys
from merge_kit.recipe.nodes import MAX_WHOLE
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
        **_record(keys.RECIPE_KEYS, _top(), ()),
        "anyOf": [{"required": ["merge_method"]}, {"required": ["tensors", "base_model"]}],
        "$defs": _definitions(),
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
        "models": _list_of("entry"),
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
    source: Schema = {**entry, "layer_range": _ref("layer_range")}
    piece: Schema = {"sources": _list_of("source"), "base_model": model, "parameters": given}
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
        "source": _record(keys.SOURCE_KEYS, source, ("model", "layer_range")),
        "slice": _record(keys.SLICE_KEYS, piece, ("sources",)),
        "module": _record(keys.MODULE_KEYS, module, ()),
        "rule": _record(keys.RULE_KEYS, rule, ("match",)),
        "tokenizer": _record(keys.TOKENIZER_KEYS, tokenizer, ()),
        "layer_range": {"type": "array", "items": _WHOLE, "minItems": 2, "maxItems": 2},
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
