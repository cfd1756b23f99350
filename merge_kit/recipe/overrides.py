"""`--set key=value`: one value of a recipe's last document, replaced before it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from merge_kit.core.names import nearest
from merge_kit.errors import MergeKitError, Problems, RecipeError, UsageError, raise_all
from merge_kit.recipe.findings import Findings
from merge_kit.recipe.keys import DEAD_KEYS, MOE_KEYS, RECIPE_KEYS
from merge_kit.recipe.nodes import Node, Path, SetMark
from merge_kit.recipe.values import Mark
from merge_kit.recipe.yaml_text import read_value

_KEYS = {**RECIPE_KEYS, **MOE_KEYS}
_EXAMPLE = "write for example models.0.parameters.weight=0.5"


def apply_overrides(document: Node, overrides: Sequence[str]) -> Node:
    """Return the document with each override applied, in order.

    Raises:
        UsageError: If one is not of the form key=value, its value is no YAML, or its path leads
            nowhere (several: Problems).
    """
    errors: list[MergeKitError] = []
    for override in overrides:
        try:
            document = _apply(document, override)
        except UsageError as error:
            errors.append(error)
    raise_all(errors)
    return document


def _apply(document: Node, override: str) -> Node:
    key, equals, text = override.partition("=")
    mark = SetMark("--set", 0, 0, override)
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UsageError("expected key=value", where=str(mark), hint=_EXAMPLE)
    if parts[0] not in _KEYS and parts[0] not in DEAD_KEYS:
        hint = nearest(parts[0], _KEYS)
        raise UsageError(f"a recipe has no key {parts[0]!r}", where=str(mark), hint=hint)
    return _assign(document, parts, _value(text, mark), mark)


def _value(text: str, mark: Mark) -> Node:
    findings = Findings()
    try:
        value = read_value(text, str(mark), findings)
        findings.raise_all()
    except Problems as problems:
        first = problems.errors[0]
        raise UsageError(first.problem, where=str(mark), hint=first.hint) from first
    except RecipeError as error:
        raise UsageError(error.problem, where=str(mark), hint=error.hint) from error
    return value


def _assign(node: Node, parts: list[str], value: Node, mark: Mark) -> Node:
    if not parts:
        return _moved(value, node.path, mark, node.key_mark)
    match node.content:
        case tuple() as items:
            i = _index(node, parts[0], mark)
            changed = _assign(items[i], parts[1:], value, mark)
            return replace(node, content=(*items[:i], changed, *items[i + 1 :]))
        case Mapping() as entries:
            key, rest = _key(entries, parts)
            missing = Node(None, mark, (*node.path, key), mark)
            changed = _assign(entries.get(key, missing), rest, value, mark)
            return replace(node, content={**entries, key: changed})
        case None:
            empty = replace(node, content={}, mark=mark)
            return _assign(empty, parts, value, mark)
        case _:
            problem = f"{node.name} is a single value and has no {parts[0]!r} in it"
            raise UsageError(problem, where=str(mark), hint="end the path there")


def _index(node: Node, text: str, mark: Mark) -> int:
    count = len(node.content) if isinstance(node.content, tuple) else 0
    if text.isascii() and text.isdigit() and int(text[:9]) < count:
        return int(text[:9])
    counted = f"indices 0 to {count - 1}" if count else "no entries"
    problem = f"{node.name} is a list with {counted}, found {text!r}"
    raise UsageError(problem, where=str(mark), hint=_EXAMPLE)


def _key(entries: Mapping[str, Node], parts: list[str]) -> tuple[str, list[str]]:
    """Return the longest key that is there already (keys may hold dots), or the first part."""
    for length in range(len(parts), 0, -1):
        key = ".".join(parts[:length])
        if key in entries:
            return key, parts[length:]
    return parts[0], parts[1:]


def _moved(node: Node, path: Path, mark: Mark, key_mark: Mark | None) -> Node:
    """Return an override's value as it stands at its path, all of it at the override's mark."""
    content = node.content
    if isinstance(content, tuple):
        items = enumerate(content)
        content = tuple(_moved(item, (*path, i), mark, mark) for i, item in items)
    elif isinstance(content, Mapping):
        content = {k: _moved(v, (*path, k), mark, mark) for k, v in content.items()}
    return Node(content, mark, path, key_mark)
