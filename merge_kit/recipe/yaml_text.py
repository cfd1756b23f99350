"""YAML text -> nodes with marks: plain values only, bounded in size, depth and aliases."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from merge_kit.errors import RecipeError
from merge_kit.recipe.findings import Findings
from merge_kit.recipe.nodes import MAX_DEPTH, MAX_NODES, MAX_WHOLE, Content, Node, Path
from merge_kit.recipe.values import Mark, Scalar

LIMIT_BYTES = 1_000_000
"""Largest size of a recipe."""

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_UNPRINTABLE = re.compile(r"[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_TAG = "tag:yaml.org,2002:"
_SCALARS = frozenset(_TAG + kind for kind in ("str", "int", "float", "bool", "null"))
_TEXTS = frozenset(_TAG + kind for kind in ("timestamp", "value", "merge"))  # plain text to us
_PLAIN = "write plain text, numbers, lists and mappings"


def read_documents(text: str, source: str, findings: Findings) -> list[Node]:
    """Return the documents of a text that are not empty, each a mapping.

    Problems that leave the rest readable (duplicate keys, tags) go to the findings.

    Raises:
        RecipeError: If the text is no YAML, too large, nested too deeply, or empty.
    """
    _check_characters(text, source)
    try:
        _check_depth(text, source)
        documents = _build(text, source, findings)
    except yaml.YAMLError as exc:
        raise _syntax_error(exc, text, source) from exc
    found = [node for node in documents if node.content is not None]
    if not found:
        hint = "a recipe needs at least merge_method and models"
        raise RecipeError("the recipe is empty", where=str(Mark(source, 1, 1)), hint=hint)
    return found


def read_value(text: str, source: str, findings: Findings) -> Node:
    """Return the one value that a text holds, null for an empty text; bounds as above."""
    _check_characters(text, source)
    try:
        _check_depth(text, source)
        documents = _build(text, source, findings)
    except yaml.YAMLError as exc:
        raise _syntax_error(exc, text, source) from exc
    if len(documents) > 1:
        raise RecipeError("found several documents, expected one value", where=source)
    return documents[0] if documents else Node(None, Mark(source, 1, 1))


def place(text: str, index: int, source: str) -> Mark:
    """Return the mark of a character of a text."""
    before = text[:index]
    return Mark(source, before.count("\n") + 1, index - (before.rfind("\n") + 1) + 1)


def too_large(source: str) -> RecipeError:
    """Return the error for a text of more than LIMIT_BYTES."""
    hint = "is this the recipe, and not a file of weights?"
    problem = "the recipe is larger than 1 MB"
    return RecipeError(problem, where=str(Mark(source, 1, 1)), hint=hint)


def _check_characters(text: str, source: str) -> None:
    if len(text.encode("utf-8", "surrogatepass")) > LIMIT_BYTES:
        raise too_large(source)
    bad = _UNPRINTABLE.search(text, 1 if text.startswith("\ufeff") else 0)
    if bad:
        where = str(place(text, bad.start(), source))
        problem = f"found the control character U+{ord(bad[0]):04X}, expected printable text"
        raise RecipeError(problem, where=where, hint="delete it, or save the file as UTF-8 text")


def _check_depth(text: str, source: str) -> None:
    """Refuse deep nesting before anything recursive sees the text."""
    depth = 0
    for event in yaml.parse(text, Loader=LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _too_deep(_mark(event.start_mark, source))


def _build(text: str, source: str, findings: Findings) -> list[Node]:
    loader = LOADER(text)
    try:
        documents = []
        builder = _Builder(loader, source, findings)
        while loader.check_node():
            documents.append(builder.build(loader.get_node(), ()))
        return documents
    finally:
        loader.dispose()


def _mark(mark: Any, source: str) -> Mark:
    return Mark(source, mark.line + 1, mark.column + 1)


def _too_deep(mark: Mark) -> RecipeError:
    problem = f"nested more than {MAX_DEPTH} levels deep, or an alias within itself"
    return RecipeError(problem, where=str(mark), hint="a recipe needs fewer than ten levels")


def _syntax_error(exc: yaml.YAMLError, text: str, source: str) -> RecipeError:
    mark = getattr(exc, "problem_mark", None) or getattr(exc, "context_mark", None)
    if mark is None:  # an encoding that the reader refuses has no mark
        return RecipeError("this is no YAML text", where=source, hint="save the file as UTF-8 text")
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    hint = 'check the indentation; text that holds ": " or starts with a symbol needs quotes'
    if "\t" in line[: mark.column + 1]:
        hint = "indent with spaces, not with tabs"
    problem = getattr(exc, "problem", None) or getattr(exc, "context", None) or "syntax error"
    start, context = getattr(exc, "context_mark", None), getattr(exc, "context", None)
    if start is not None and context and start.line != mark.line:
        problem = f"{problem} ({context} that starts in line {start.line + 1})"
    return RecipeError(f"not valid YAML: {problem}", where=str(_mark(mark, source)), hint=hint)


@dataclass(slots=True)
class _Builder:
    """Turns composed nodes into ours; counts what aliases expand to."""

    loader: Any
    source: str
    findings: Findings
    nodes: int = 0

    def build(self, node: Any, path: Path, key_mark: Mark | None = None) -> Node:
        mark = self.count(node, len(path))
        content: Content
        if isinstance(node, yaml.MappingNode):
            self.check_tag(node, mark, "map")
            content = self.mapping(node, path)
        elif isinstance(node, yaml.SequenceNode):
            self.check_tag(node, mark, "seq")
            items = enumerate(node.value)
            content = tuple(self.build(item, (*path, i)) for i, item in items)
        else:
            content = self.scalar(node, mark)
        return Node(content, mark, path, key_mark)

    def count(self, node: Any, depth: int) -> Mark:
        mark = _mark(node.start_mark, self.source)
        self.nodes += 1
        if self.nodes > MAX_NODES:
            problem = f"the recipe's aliases expand to more than {MAX_NODES:,} values"
            raise RecipeError(problem, where=str(mark), hint="write the values out")
        if depth > MAX_DEPTH:
            raise _too_deep(mark)
        return mark

    def check_tag(self, node: Any, mark: Mark, kind: str) -> None:
        if node.tag != _TAG + kind:
            self.refuse_tag(node, mark)

    def refuse_tag(self, node: Any, mark: Mark) -> None:
        tag = node.tag.replace(_TAG, "!!")
        self.findings.error(mark, f"the tag {tag} is not allowed in a recipe", _PLAIN)

    def scalar(self, node: Any, mark: Mark) -> Scalar | None:
        text: str = node.value
        if node.tag in _TEXTS:
            return text
        if node.tag not in _SCALARS:
            self.refuse_tag(node, mark)
            return text
        try:
            value: Scalar | None = self.loader.construct_object(node)
        except (ValueError, KeyError, OverflowError):
            self.findings.error(mark, f"{text[:60]!r} is no {node.tag.removeprefix(_TAG)}")
            return text
        is_huge = isinstance(value, int) and abs(value) > MAX_WHOLE
        return text if is_huge else value  # thousands of digits cannot even be printed

    def mapping(self, node: Any, path: Path) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        merged: list[Any] = []
        for key, value in node.value:
            if key.tag == _TAG + "merge":
                merged.append(value)
                continue
            mark, name = _mark(key.start_mark, self.source), self.key(key)
            if name in entries:
                first = entries[name].key.line
                problem = f"the key {name!r} stands twice, first in line {first}"
                self.findings.error(mark, problem, "keep one of the two")
            elif name is not None:
                entries[name] = self.build(value, (*path, name), mark)
        for name, mark, value in self.merged(merged, len(path)):
            if name not in entries:
                entries[name] = self.build(value, (*path, name), mark)
        return entries

    def key(self, node: Any) -> str | None:
        if isinstance(node, yaml.ScalarNode):
            return str(node.value)
        mark = _mark(node.start_mark, self.source)
        self.findings.error(mark, "a key is a list or mapping, expected text", _PLAIN)
        return None

    def merged(self, values: list[Any], depth: int) -> Iterator[tuple[str, Mark, Any]]:
        """Yield the entries of mappings under `<<`, those that win first."""
        for value in values:
            mark = self.count(value, depth)
            if isinstance(value, yaml.SequenceNode):
                yield from self.merged(value.value, depth + 1)
                continue
            if not isinstance(value, yaml.MappingNode):
                self.findings.error(mark, "<< expects a mapping, or a list of mappings")
                continue
            for key, child in value.value:
                name = self.key(key) if key.tag != _TAG + "merge" else None
                if name is not None:
                    yield name, _mark(key.start_mark, self.source), child
            inner = [child for key, child in value.value if key.tag == _TAG + "merge"]
            yield from self.merged(inner, depth + 1)
