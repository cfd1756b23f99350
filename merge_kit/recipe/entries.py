"""`models:`, `slices:` and `modules:` -> values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from merge_kit.core.layers import LayerList, LayerRange, Layers
from merge_kit.errors import PlanError
from merge_kit.methods.base import MergeMethod
from merge_kit.methods.registry import every_parameter, find
from merge_kit.recipe.experts import with_model_keys
from merge_kit.recipe.keys import (
    ENTRY_KEYS,
    EXPERT_KEYS,
    MODULE_KEYS,
    PROMPT_KEYS,
    SLICE_KEYS,
    SOURCE_KEYS,
)
from merge_kit.recipe.nodes import Node
from merge_kit.recipe.prompts import read_prompts
from merge_kit.recipe.references import read_reference
from merge_kit.recipe.settings import Scope, read_parameters
from merge_kit.recipe.values import Entry, ModelRef, Module, Slice


def read_method(scope: Scope, node: Node) -> type[MergeMethod] | None:
    """Return the method that a node names, or None with a problem recorded."""
    name = scope.findings.text(node)
    if name is None:
        return None
    try:
        return find(name)
    except PlanError as error:
        scope.findings.error(node.mark, error.problem, error.hint)
        return None


def read_model(scope: Scope, node: Node | None) -> ModelRef | None:
    """Return a reference, None where there is none or with a problem recorded."""
    return None if node is None else read_reference(node, scope.folder, scope.findings)


def read_models(scope: Scope, node: Node | None) -> tuple[Entry, ...]:
    """Return the entries of `models`."""
    return _entries(scope, node, ENTRY_KEYS, "models")


def read_experts(scope: Scope, node: Node | None) -> tuple[Entry, ...]:
    """Return the entries of a recipe's `models`, which may have prompts if they become experts."""
    becomes = any(method.method_name == "sparse_upcycle" for method in scope.methods[:1])
    keys = EXPERT_KEYS if becomes or not scope.methods else ENTRY_KEYS
    return _entries(scope, node, keys, "models")


def read_shared_experts(scope: Scope, node: Node | None) -> tuple[Entry, ...]:
    """Return the entries of `shared_experts`: one, of a model that becomes a mixture."""
    if node is None or node.is_empty:
        return ()
    other = [m.method_name for m in scope.methods[:1] if m.method_name != "sparse_upcycle"]
    if other:
        hint = "it is for merge_method: sparse_upcycle"
        scope.findings.error(node.key, f"shared_experts has no meaning with {other[0]}", hint)
        return ()
    items = with_model_keys(scope.findings.items(node))
    if len(items) > 1:
        scope.findings.wrong(node, "one model", "a token passes one shared expert")
    entries = [_entry(scope, item, EXPERT_KEYS) for item in items]
    return tuple(entry for entry in entries if entry is not None)


def _entries(
    scope: Scope, node: Node | None, keys: Mapping[str, str], where: str
) -> tuple[Entry, ...]:
    if node is None:
        return ()
    entries = [_entry(scope, item, keys) for item in scope.findings.items(node)]
    found = [entry for entry in entries if entry is not None]
    _refuse_duplicates(scope, found, where)
    return tuple(found)


def _entry(scope: Scope, node: Node, keys: Mapping[str, str]) -> Entry | None:
    hints = {"layer_range": "layers are chosen by the sources of slices"}
    hints["lora"] = "write model: {model: NAME, lora: ADAPTER}"
    hints |= {name: f"write parameters: {{{name}: ...}}" for name in every_parameter()}
    hints |= dict.fromkeys(PROMPT_KEYS, "prompts are for the models of a sparse_upcycle")
    hints["source_model"] = "write model: NAME"
    fields = scope.findings.fields(node, keys, ("model",), hints)
    model = read_model(scope, fields.get("model"))
    parameters = read_parameters(scope, fields.get("parameters"), of_model=True)
    layers = _layers(scope, node, fields) if "layer_range" in keys else None
    prompts = read_prompts(scope.findings, fields)
    if model is None or (layers is None and "layer_range" in keys):
        return None
    return Entry(model, parameters, node.mark, layers, prompts)


def _layers(scope: Scope, source: Node, fields: Mapping[str, Node]) -> Layers | None:
    """Return the layers of a source: a range or a list, exactly one of the two."""
    span, listed = fields.get("layer_range"), fields.get("layers")
    if span is not None and listed is not None:
        problem = "found both layer_range and layers, expected one of them"
        scope.findings.error(listed.key, problem, "keep the one that names the layers")
        return None
    if listed is not None:
        return _layer_list(scope, listed)
    if span is not None:
        return _layer_range(scope, span)
    if isinstance(source.content, Mapping):
        problem, hint = f"layer_range is missing in {source.name}", SOURCE_KEYS["layer_range"]
        entry = source.content.get("layer_range")
        mark = entry.mark if entry is not None else source.mark
        scope.findings.error(mark, problem, f"layer_range: {hint}; or layers: a list of them")
    return None


def _layer_list(scope: Scope, node: Node) -> LayerList | None:
    """Return layers in any order, each once."""
    expected = "a list of at least one layer, counted from 0"
    if not isinstance(node.content, tuple) or not node.content:
        scope.findings.wrong(node, expected, "write for example [0, 3, 5]")
        return None
    found = [scope.findings.whole(item) for item in node.content]
    numbers = tuple(number for number in found if number is not None)
    if len(numbers) < len(found):
        return None
    seen: set[int] = set()
    for item, number in zip(node.content, numbers, strict=True):
        if number in seen:
            problem = f"layer {number} stands twice in layers"
            scope.findings.error(item.mark, problem, "write a second slice for the second time")
            return None
        seen.add(number)
    return LayerList(numbers)


def _layer_range(scope: Scope, node: Node) -> LayerRange | None:
    """Return `[a, b]` with 0 <= a <= b; whole numbers may be written as text."""
    expected, content = "two whole numbers [first, last + 1]", node.content
    if not isinstance(content, tuple) or len(content) != 2:
        scope.findings.wrong(node, expected, "write for example [0, 16]")
        return None
    start, stop = (scope.findings.whole(item) for item in content)
    if start is None or stop is None:
        return None
    if start > stop:
        problem = f"{node.name} is [{start}, {stop}], expected the smaller number first"
        scope.findings.error(node.mark, problem, "layers cannot be taken in reverse")
        return None
    return LayerRange(start, stop)


def _refuse_duplicates(scope: Scope, entries: Sequence[Entry], where: str) -> None:
    if scope.methods and all(method.makes != "model" for method in scope.methods):
        return  # an adapter may be named twice, and a model may be two experts
    first: dict[ModelRef, Entry] = {}
    for entry in entries:
        known = first.setdefault(entry.model, entry)
        if known is not entry:
            line = f", first in line {known.mark.line}" if known.mark.line else ""
            problem = f"{entry.model.text!r} stands twice in {where}{line}"
            scope.findings.error(entry.model.mark, problem, _instead_of_twice(known, entry))


def _instead_of_twice(first: Entry, again: Entry) -> str:
    """Return what to write for a model that stands twice: other layers of it are another source."""
    if first.layers == again.layers:
        return "list it once, with the sum of the weights"
    model, plus, adapters = again.model.text.partition("+")
    if "@" in model:
        return "give the layers to a document with a name, and list its result"
    return (
        f"for other layers of it write {model}@again{plus}{adapters}: of a local path, what "
        "follows @ is ignored"
    )


def read_slices(scope: Scope, node: Node | None) -> tuple[Slice, ...]:
    """Return the entries of `slices`."""
    return () if node is None else tuple(_slice(scope, i) for i in scope.findings.items(node))


def slice_methods(scope: Scope, node: Node | None) -> Scope:
    """Return the scope of parameters above slices: the methods of the slices read them, too."""
    if node is None or not scope.methods:
        return scope
    try:
        own = tuple(find(name) for name in _slice_methods(node))
    except PlanError:  # reported where the name stands
        return replace(scope, methods=())
    return replace(scope, methods=tuple(dict.fromkeys((*scope.methods, *own))))


def _slice_methods(node: Node) -> Iterator[str]:
    """Yield the name of each slice's own method."""
    for item in node.content if isinstance(node.content, tuple) else ():
        method = item.content.get("merge_method") if isinstance(item.content, Mapping) else None
        if method is not None and method.content is not None:
            yield str(method.content)


def _slice_method(scope: Scope, node: Node) -> type[MergeMethod] | None:
    """Return the method of one slice, which must merge models."""
    method = read_method(scope, node)
    if method is None or method.makes == "model":
        return method
    made = "an adapter" if method.makes == "adapter" else "a whole model"
    problem = f"{method.method_name} makes {made}, and cannot merge the layers of a slice"
    scope.findings.error(node.mark, problem, "give it a document with a name, and use its result")
    return None


def _slice(scope: Scope, node: Node) -> Slice:
    fields = scope.findings.fields(node, SLICE_KEYS, ("sources",))
    method = None
    if "merge_method" in fields:
        method = _slice_method(scope, fields["merge_method"])
        scope = replace(scope, methods=(method,) if method else ())
    sources = _entries(scope, fields.get("sources"), SOURCE_KEYS, "one slice")
    if "sources" in fields and fields["sources"].is_empty:
        hint = "write for example [{model: NAME, layer_range: [0, 16]}]"
        scope.findings.wrong(fields["sources"], "at least one model with its layers", hint)
    lengths = [(len(entry.layers), entry) for entry in sources if entry.layers is not None]
    for length, entry in lengths[1:]:
        if length != lengths[0][0]:
            problem = f"a source has {length} layers, the first of its slice {lengths[0][0]}"
            scope.findings.error(entry.mark, problem, "sources of one slice are equally long")
    base = read_model(scope, fields.get("base_model"))
    parameters = read_parameters(scope, fields.get("parameters"))
    return Slice(
        sources, node.mark, base, parameters, method.method_name if method is not None else None
    )


def read_modules(scope: Scope, node: Node | None) -> tuple[Module, ...]:
    """Return the entries of `modules`, in their order."""
    if node is None:
        return ()
    return tuple(_module(scope, k, v) for k, v in scope.findings.mapping(node).items())


def _module(scope: Scope, name: str, node: Node) -> Module:
    fields = scope.findings.fields(node, MODULE_KEYS)
    full = [key for key in ("models", "slices") if key in fields and not fields[key].is_empty]
    if isinstance(node.content, Mapping) and len(full) != 1:
        found = " and ".join(full) or "neither"
        problem = f"{node.name} has {found}, expected either models or slices"
        scope.findings.error(fields[full[1]].key if full else node.mark, problem)
    models = read_models(scope, fields.get("models"))
    slices = read_slices(scope, fields.get("slices"))
    above = slice_methods(scope, fields.get("slices"))
    parameters = read_parameters(above, fields.get("parameters"))
    return Module(name, node.mark, models, slices, parameters)
