"""References to models: `path@revision+adapter@revision`, or a mapping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from merge_kit.errors import RecipeError
from merge_kit.recipe.findings import Findings
from merge_kit.recipe.keys import ADAPTER_KEYS, PATH_KEYS, REFERENCE_KEYS
from merge_kit.recipe.lookup import EXPECTED, converted
from merge_kit.recipe.nodes import Node
from merge_kit.recipe.values import Mark, ModelRef

MAX_PARTS = 32
"""Most parts of a reference that are joined by `+`."""

_LITERAL = "write {model: {path: NAME}} where + or @ belongs to the name"


def split_reference(text: str, folder: Path | None, mark: Mark) -> ModelRef:
    """Return the reference that a text is: `path`, `path@revision`, `path+adapter`, ...

    A path that exists (beside the recipe in `folder`, then in the working directory) is taken
    whole, whatever `+` and `@` it holds. Adapters stay as written, `adapter@revision`; see
    `adapter_reference`.

    Raises:
        RecipeError: If a part is empty, has two revisions, or there are more than MAX_PARTS.
    """
    parts = _parts(text, lambda name: _exists(name, folder), mark)
    path, revision = _revision(parts[0], folder, mark)
    for adapter in parts[1:]:
        _revision(adapter, folder, mark)
    return ModelRef(path, revision, tuple(parts[1:]), text, mark)


def adapter_reference(text: str, folder: Path | None, mark: Mark) -> ModelRef:
    """Return the reference of one adapter of a model, `path` or `path@revision`.

    Raises:
        RecipeError: If it is none.
    """
    path, revision = _revision(text, folder, mark)
    return ModelRef(path, revision, (), text, mark)


def read_reference(node: Node, folder: Path | None, findings: Findings) -> ModelRef | None:
    """Return a reference, or None with a problem recorded."""
    try:
        if isinstance(node.content, Mapping):
            return _from_mapping(node, folder, findings)
        text = findings.text(node)
        return split_reference(text, folder, node.mark) if text is not None else None
    except RecipeError as error:
        findings.error(node.mark, error.problem, error.hint)
        return None


def _from_mapping(node: Node, folder: Path | None, findings: Findings) -> ModelRef | None:
    hints = {"path": "write {model: {path: ...}}", "revision": "write {model: {path, revision}}"}
    entries = findings.fields(node, REFERENCE_KEYS, ("model",), hints)
    if "override_architecture" in entries:
        mark = entries["override_architecture"].key
        findings.note(mark, "override_architecture has no effect (names come from the files)")
    model = _part(entries["model"], folder, findings) if "model" in entries else None
    found = _adapters(entries.get("lora"), folder, findings)
    if model is None or found is None:
        return None
    adapters, weights = tuple(text for text, _ in found), tuple(weight for _, weight in found)
    text = "+".join((f"{model[0]}@{model[1]}" if model[1] else model[0], *adapters))
    given = () if set(weights) <= {1.0} else weights
    return ModelRef(*model, adapters, text, node.mark, given)


def _adapters(
    node: Node | None, folder: Path | None, findings: Findings
) -> tuple[tuple[str, float], ...] | None:
    """Return reference and weight of each adapter, None with a problem recorded."""
    if node is None:
        return ()
    nodes = node.content if isinstance(node.content, tuple) else (node,)
    if len(nodes) > MAX_PARTS:
        findings.error(node.mark, f"{len(nodes)} adapters, expected at most {MAX_PARTS}")
        return None
    found = [_adapter(item, folder, findings) for item in nodes]
    known = [one for one in found if one is not None]
    return tuple(known) if len(known) == len(found) else None


def _adapter(node: Node, folder: Path | None, findings: Findings) -> tuple[str, float] | None:
    part, weight = _part(node, folder, findings, ADAPTER_KEYS), _weight(node, findings)
    if part is None or weight is None:
        return None
    path, revision = part
    return (f"{path}@{revision}" if revision else path), weight


def _weight(node: Node, findings: Findings) -> float | None:
    """Return the weight of an adapter, 1 by default, None with a problem recorded."""
    given = node.content.get("weight") if isinstance(node.content, Mapping) else None
    if given is None or given.content is None:
        return 1.0
    content, number = given.content, None
    if isinstance(content, int | float | str) and not isinstance(content, bool):
        number = converted(content, float)
    if number is None:
        findings.wrong(given, EXPECTED[float])
        return None
    return float(number)


def _part(
    node: Node,
    folder: Path | None,
    findings: Findings,
    valid: Mapping[str, str] = PATH_KEYS,
) -> tuple[str, str | None] | None:
    """Return path and revision of a text that `+` does not split, or of a mapping."""
    if not isinstance(node.content, Mapping):
        text = findings.text(node)
        return _revision(text, folder, node.mark) if text is not None else None
    entries = findings.fields(node, valid, ("path",))
    path = findings.text(entries["path"]) if "path" in entries else None
    revision = findings.text(entries["revision"]) if "revision" in entries else None
    return None if path is None else (path, revision)


def _parts(text: str, exists: Callable[[str], bool], mark: Mark) -> list[str]:
    """Return the parts between `+`, each as long as it can be where that is a path."""

    def known(name: str) -> bool:
        path, _, revision = name.rpartition("@")
        return exists(name) or ("+" not in revision and exists(path))

    tokens = text.split("+")
    if len(tokens) > MAX_PARTS:
        problem = f"a reference of {len(tokens)} parts, expected at most {MAX_PARTS}"
        raise RecipeError(problem, where=str(mark))
    parts, start = [], 0
    while start < len(tokens):
        stops = range(len(tokens), start + 1, -1)
        stop = next((s for s in stops if known("+".join(tokens[start:s]))), start + 1)
        parts.append("+".join(tokens[start:stop]))
        start = stop
    return parts


def _revision(text: str, folder: Path | None, mark: Mark) -> tuple[str, str | None]:
    """Return a part's path and revision."""
    if text and _exists(text, folder):
        return text, None
    path, at, revision = text.rpartition("@")
    if not at:
        path = text
    if not path.strip() or (at and not revision.strip()):
        problem = f"{text[:60]!r} is no reference, expected NAME, NAME@REVISION or NAME+ADAPTER"
        raise RecipeError(problem, where=str(mark), hint=_LITERAL)
    if "@" in path and not _exists(path, folder):
        raise RecipeError(f"{text[:60]!r} has two revisions", where=str(mark), hint=_LITERAL)
    return path, revision if at else None


def _exists(name: str, folder: Path | None) -> bool:
    if not name.strip():
        return False
    roots = (Path(), folder) if folder else (Path(),)
    try:
        return any((root / name).exists() for root in roots)
    except (OSError, ValueError):  # a name that no file can have: too long, NUL
        return False
