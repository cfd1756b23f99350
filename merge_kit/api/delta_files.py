"""Task vectors as folders: the differences, and a file that says what they are of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from merge_kit.api.changes import Sum, differences, prunes
from merge_kit.api.held import HeldModel
from merge_kit.api.mergeable import write
from merge_kit.api.merging import Size
from merge_kit.api.places import is_there, place_of
from merge_kit.api.requests import Node, Request
from merge_kit.errors import CheckpointError, UsageError
from merge_kit.io.small_files import read_bytes
from merge_kit.io.strict_json import parse_object, shown
from merge_kit.plan.values import SideFile

MARKER = "merge_kit_delta.json"
STEM = "delta"
FORMAT = 1
_MAX_BYTES = 16 << 20


def save(
    request: Request,
    terms: Sum,
    folder: Path,
    *,
    overwrite: bool,
    shard_size: Size | None,
    threads: int | None,
) -> Path:
    """Write differences into a folder, with the marker; return the folder."""
    return write(
        request,
        folder,
        stem=STEM,
        beside=(SideFile(MARKER, text=_text(terms)),),
        overwrite=overwrite,
        shard_size=shard_size,
        threads=threads,
    )


def opened(folder: Path) -> HeldModel:
    """Return the differences in a folder.

    Raises:
        CheckpointError: If it holds none, or is broken.
    """
    path = place_of(folder) / MARKER
    if not is_there(path):
        hint = "name a folder that TaskVector.save has written"
        raise CheckpointError(f"there is no {MARKER}", where=str(folder), hint=hint)
    found = parse_object(read_bytes(path, _MAX_BYTES), where=str(path), what="record")
    if found.get("format") != FORMAT:
        problem = f"has format {shown(found.get('format'))}, expected {FORMAT}"
        raise CheckpointError(problem, where=str(path), hint="was it written by a newer merge_kit?")
    return HeldModel(folder)


def refuse(path: Path) -> None:
    """Refuse a folder of differences where a model is expected."""
    if is_there(place_of(path) / MARKER):
        problem = f"{path} holds the differences of a task vector, expected a model"
        raise UsageError(problem, hint="load it with TaskVector.load, and add it to its base")


def _text(terms: Sum) -> str:
    """Return the marker: names of folders, never paths."""
    leaves = list(differences(terms))
    record: dict[str, Any] = {
        "format": FORMAT,
        "bases": _names([leaf.base for leaf in leaves if leaf.base is not None]),
        "models": _names([leaf.model for leaf in leaves]),
        "pruned": [{"density": one.density, "how": one.how} for one in prunes(terms)],
    }
    return json.dumps(record, indent=1, ensure_ascii=True) + "\n"


def _names(nodes: list[Node]) -> list[str]:
    found = {node.key: _name(node) for node in nodes}
    return list(found.values())


def _name(node: Node) -> str:
    return node.name if isinstance(node, HeldModel) else str(node)
