"""`models:`, `slices:` and `modules:` -> values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merge_kit.core.layers import LayerRange
from merge_kit.errors import PlanError
from merge_kit.methods.base import MergeMethod
from merge_kit.methods.registry import every_parameter, find
from merge_kit.recipe.keys import ENTRY_KEYS, MODULE_KEYS, SLICE_KEYS, SOURCE_KEYS
from merge_kit.recipe.nodes import Node
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
    required = [key for key in keys if key != "parameters"]
    fields = scope.findings.fields(node, keys, required, hints)
    model = read_model(scope, fields.get("model"))
    parameters = read_parameters(scope, fields.get("parameters"), of_model=True)
    layers = _layers(scope, fields["layer_range"]) if "layer_range" in fields else None
    if model is None or (layers is None and "layer_range" in keys):
        return None
    return Entry(model, parameters, node.mark, layers)


def _layers(scope: Scope, node: Node) -> LayerRange | None:
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
    if scope.methods and all(method.makes == "adapter" for method in scope.methods):
        return  # an adapter may be named twice
    first: dict[ModelRef, Entry] = {}
    for entry in entries:
        known = first.setdefault(entry.model, entry)
        if known is not entry:
            line = f", first in line {known.mark.line}" if known.mark.line else ""
            problem = f"{entry.model.text!r} stands twice in {where}{line}"
            hint = "list it once, with the sum of the weights"
            scope.findings.error(entry.model.mark, problem, hint)


def read_slices(scope: Scope, node: Node | None) -> tuple[Slice, ...]:
    """Return the entries of `slices`."""
    return () if node is None else tuple(_slice(scope, i) for i in scope.findings.items(node))


def _slice(scope: Scope, node: Node) -> Slice:
    fields = scope.findings.fields(node, SLICE_KEYS, ("sources",))
    sources = _entries(scope, fields.get("sources"), SOURCE_KEYS, "one slice")
    if "sources" in fields and fields["sources"].is_empty:
        scope.findings.wrong(fields["sources"], "at least one model with a layer_range")
    lengths = [(len(entry.layers), entry) for entry in sources if entry.layers is not None]
    for length, entry in lengths[1:]:
        if length != lengths[0][0]:
            problem = f"a source has {length} layers, the first of its slice {lengths[0][0]}"
            scope.findings.error(entry.mark, problem, "sources of one slice are equally long")
    base = read_model(scope, fields.get("base_model"))
    parameters = read_parameters(scope, fields.get("parameters"))
    return Slice(sources, node.mark, base, parameters)


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
    parameters = read_parameters(scope, fields.get("parameters"))
    return Module(name, node.mark, models, slices, parameters)
