"""Recipes as an output shows them: without the places where models lie on one machine."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import yaml

from merge_kit.errors import RecipeError
from merge_kit.plan.values import PlanInput
from merge_kit.publish.references import References, folder_name, without_homes

Rewrite = Callable[[str, str], str]
_KEY = re.compile(r"^(input-\d+|statistics-\d+|numbers-\d+|local):")
_SUFFIX = re.compile(r"\.safetensors(?=$|:)")
"""At the end, or before the name of a tensor of the file."""
_STRING = "tag:yaml.org,2002:str"
_SCALARS: Any = yaml.SafeLoader("")
_PARAMETERS = "parameters"
_FILES = {"statistics", "basis"}
"""Parameters whose values are files."""
_REFERENCES = {
    "model",
    "source_model",
    "base_model",
    "lora",
    "path",
    "copy",
    "source",
    "tokenizer_source",
    *_FILES,
}


def portable_recipe(recipe_text: str, inputs: Sequence[PlanInput]) -> str:
    """Return a recipe with each local reference replaced by `input-1:name`, as YAML.

    Hub ids and names of stages stay. Comments are left out, since nobody looks through them for
    paths and names.

    Raises:
        RecipeError: If the text is no YAML.
    """
    documents = _documents(recipe_text)
    references = References(inputs, set(_stage_names(documents)))

    def rewrite(key: str, text: str) -> str:
        if key in _REFERENCES:
            return references.portable(key, text)
        return folder_name(text) if key == "output" else without_homes(text)

    seen: set[int] = set()
    for document in documents:
        _rewrite(document, "", rewrite, seen)
    shown: str = yaml.serialize_all(
        documents, Dumper=yaml.SafeDumper, allow_unicode=True, width=100
    )
    return shown


def recipe_methods(text: str) -> tuple[str, ...]:
    """Return every method that a recipe names, in its order; that of mergekit-moe's documents too.

    Raises:
        RecipeError: If the text is no YAML.
    """
    found: list[str] = []
    for document in _documents(text):
        keys = {k.value for k, _ in document.value} if document.id == "mapping" else set()
        if "experts" in keys and "merge_method" not in keys:
            found.append("sparse_upcycle")
        _collect(document, found, set())
    return tuple(dict.fromkeys(found))


def _collect(node: Any, found: list[str], seen: set[int]) -> None:
    if isinstance(node, yaml.ScalarNode) or id(node) in seen:
        return
    seen.add(id(node))
    for name, child in _children(node, ""):
        if name == "merge_method" and isinstance(child, yaml.ScalarNode):
            found.append(child.value)
        _collect(child, found, seen)


def recipe_hash(text: str) -> str:
    """Return a hash, 32 hex digits, of what a recipe says.

    Comments, layout, the order of keys, the output's name and the folders that models lie in do
    not count: of a reference, the last part of each path does.

    Raises:
        RecipeError: If the text is no YAML.
    """
    known: dict[tuple[int, str], str] = {}
    try:
        return _digest(*(_node_hash(document, "", known) for document in _documents(text)))
    except RecursionError as exc:
        raise RecipeError("the recipe is nested too deeply, or an alias in itself") from exc


def _documents(text: str) -> list[Any]:
    """Return the root nodes of the documents that are not empty."""
    try:
        nodes = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError) as exc:
        problem = "not valid YAML, or nested too deeply"
        raise RecipeError(problem, hint="is it the recipe's text?") from exc
    return [node for node in nodes if not node.tag.endswith(":null")]


def _stage_names(documents: Sequence[Any]) -> Iterator[str]:
    for document in documents:
        if isinstance(document, yaml.MappingNode):
            yield from (v.value for k, v in document.value if k.value == "name")


def _rewrite(node: Any, key: str, rewrite: Rewrite, seen: set[int]) -> None:
    """Replace texts in place; an item of a list stands under the key of the list."""
    if isinstance(node, yaml.ScalarNode):
        text = rewrite(key, node.value)
        if text != node.value:
            node.tag, node.value, node.style = _STRING, text, None
        return
    if id(node) in seen:
        return
    seen.add(id(node))
    for name, child in _children(node, key):
        _rewrite(child, name, rewrite, seen)


def _children(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield each child with the key that it stands under; "" below what holds no reference."""
    if isinstance(node, yaml.SequenceNode):
        yield from ((key, child) for child in node.value)
        return
    for name, child in node.value:
        yield from ((_below(key, str(name.value)), child), ("", name))


def _below(key: str, name: str) -> str:
    """Return the key that the value of a mapping stands under.

    Parameters hold no references, but for files: as a value, or in {filter, value}.
    """
    if key == _PARAMETERS:
        return name if name in _FILES else _PARAMETERS
    if key in _FILES:
        return key if name == "value" else _PARAMETERS
    return name


def _node_hash(node: Any, key: str, known: dict[tuple[int, str], str]) -> str:
    if isinstance(node, yaml.ScalarNode):
        return _digest(_last_parts(node.value) if key in _REFERENCES else _value(node))
    at = id(node), key  # aliases are hashed once, however often they stand
    if at not in known:
        known[at] = _digest(node.id, *_parts(node, key, known))
    return known[at]


def _parts(node: Any, key: str, known: dict[tuple[int, str], str]) -> list[str]:
    if isinstance(node, yaml.SequenceNode):
        return [_node_hash(child, key, known) for child in node.value]
    return sorted(
        _digest(str(name.value), _node_hash(child, _below(key, str(name.value)), known))
        for name, child in node.value
        if key or name.value != "output"
    )


def _value(node: Any) -> str:
    """Return a scalar as text: numbers that are equal give equal texts."""
    try:
        value = _SCALARS.construct_object(node)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return without_homes(value) if isinstance(value, str) else repr(value)
    except (ValueError, KeyError, OverflowError, yaml.YAMLError):
        return str(node.value)


def _last_parts(text: str) -> str:
    parts = (_KEY.sub("", part) for part in text.split("+"))
    return "+".join(_SUFFIX.sub("", folder_name(part)) for part in parts)


def _digest(*parts: str) -> str:
    joined = b"".join(f"{len(part)}:{part}".encode("utf-8", "surrogatepass") for part in parts)
    return hashlib.blake2b(joined, digest_size=16).hexdigest()
