"""Values of a recipe with the places they stand at, whatever they were read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike, fspath

import yaml

from merge_kit.errors import RecipeError
from merge_kit.recipe.values import Mark, Scalar

MAX_DEPTH = 64
"""Deepest nesting of a recipe; the dialect itself needs fewer than ten levels."""

MAX_NODES = 200_000
"""Most values of a recipe after its aliases are expanded."""

MAX_WHOLE = 2**63 - 1
"""Largest whole number of a recipe."""

Path = tuple[str | int, ...]
Content = Scalar | None | tuple["Node", ...] | Mapping[str, "Node"]


@dataclass(frozen=True, slots=True)
class KeyMark(Mark):
    """A place in a mapping that never was text: its key path instead of line and column."""

    path: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.path}" if self.path else self.file


@dataclass(frozen=True, slots=True)
class SetMark(Mark):
    """A place in an override; `path` is the override as the user wrote it."""

    path: str = ""

    def __str__(self) -> str:
        return f"--set {self.path[:200]}"


@dataclass(frozen=True, slots=True)
class Node:
    """A scalar, a list or a mapping, and where it stands.

    Attributes:
        path: Keys and indices that lead here from the top of the document.
        key_mark: Place of the key, for values of a mapping.
    """

    content: Content
    mark: Mark
    path: Path = ()
    key_mark: Mark | None = None

    @property
    def key(self) -> Mark:
        """Place of the key, or of the value where there is no key."""
        return self.key_mark or self.mark

    @property
    def name(self) -> str:
        """The last key with the indices behind it, for messages: "weight", "models.0"."""
        tail: list[str] = []
        for part in reversed(self.path):
            tail.append(str(part))
            if isinstance(part, str):
                break
        return ".".join(reversed(tail)) or "the document"

    @property
    def is_empty(self) -> bool:
        """Whether this is null, or a list or mapping without entries."""
        return self.content is None or self.content in ((), {})


def describe(node: Node) -> str:
    """Return what a node holds, in a few words."""
    match node.content:
        case None:
            return "empty"
        case tuple():
            return f"a list of {len(node.content)}" if node.content else "an empty list"
        case Mapping():
            return "a mapping"
        case scalar:
            return shown(scalar)


def shown(value: Scalar) -> str:
    """Return a scalar as a message shows it: text in quotes and shortened, true and false."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    return repr(value)


def plain(node: Node) -> object:
    """Return the value of a node as Python lists, dicts and scalars."""
    match node.content:
        case tuple():
            return [plain(item) for item in node.content]
        case Mapping():
            return {key: plain(value) for key, value in node.content.items()}
        case scalar:
            return scalar


def to_yaml(documents: list[Node]) -> str:
    """Return documents as YAML text, in their own order of keys."""
    values = [plain(node) for node in documents]
    text: str = yaml.safe_dump_all(
        values, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None
    )
    return text


def from_python(value: object, source: str, path: Path = ()) -> Node:
    """Return the node of a Python value: mappings, lists, tuples, paths and scalars.

    Raises:
        RecipeError: If it holds something else, or is nested too deeply (or in itself).
    """
    mark = KeyMark(source, 0, 0, ".".join(str(part) for part in path))
    if len(path) > MAX_DEPTH:
        raise RecipeError(f"nested more than {MAX_DEPTH} levels deep", where=str(mark))
    if isinstance(value, PathLike):
        value = fspath(value)
    if value is None:
        return Node(None, mark, path, mark)
    if isinstance(value, int) and abs(value) > MAX_WHOLE:
        raise RecipeError("found an integer of more than 64 bits", where=str(mark))
    if isinstance(value, bool):
        return Node(value, mark, path, mark)
    for kind in (str, int, float):
        if isinstance(value, kind):
            return Node(kind(value), mark, path, mark)  # what numpy and enums make of them, too
    if isinstance(value, list | tuple):
        items = tuple(from_python(v, source, (*path, i)) for i, v in enumerate(value))
        return Node(items, mark, path, mark)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        entries = {k: from_python(v, source, (*path, k)) for k, v in value.items()}
        return Node(entries, mark, path, mark)
    found, expected = (
        type(value).__name__,
        "text, numbers, bools, lists and mappings with text keys",
    )
    raise RecipeError(f"found a value of type {found}, expected {expected}", where=str(mark))
