"""A file of statistics: its tensors, and what its metadata say of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_kit.errors import CheckpointError
from merge_kit.io.checkpoint import open_checkpoint
from merge_kit.io.header import read_header
from merge_kit.io.strict_json import shown
from merge_kit.io.values import WeightFile
from merge_kit.methods.evidence import COLLECT_AGAIN
from merge_kit.plan.models import Model, from_checkpoint


@dataclass(frozen=True, eq=False)
class Statistics:
    """One file, or folder of files, of statistics.

    Attributes:
        label: What messages call it.
        key: "statistics-1" in the order in which they are met.
        model: Its tensors.
        kind: "fisher", "gram", or "" where the file does not say.
        shared: Name without a tensor of its own -> the name that stands for it.
        transposed: Weights whose first axis is the input's.
        used: Names of its tensors that merges have asked for.
    """

    label: str
    key: str
    model: Model
    kind: str = ""
    shared: Mapping[str, str] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    used: set[str] = field(default_factory=set)

    def stored_name(self, name: str) -> str | None:
        """Return under which name the statistics of a tensor stand, or None."""
        stored = name if name in self.model.tensors else self.shared.get(name, "")
        return stored if stored in self.model.tensors else None

    @property
    def files(self) -> tuple[WeightFile, ...]:
        """The files; none for what is in memory."""
        components = self.model.checkpoint.components if self.model.checkpoint else ()
        return tuple(file for component in components for file in component.files)


def open_statistics(key: str, path: Path) -> Statistics:
    """Return the statistics in a safetensors file or a folder, from headers alone.

    Raises:
        CheckpointError: If it is broken, or its metadata are not what they should be.
    """
    checkpoint = open_checkpoint(path)
    model = from_checkpoint(key, checkpoint)
    kind, shared, transposed = "", dict[str, str](), set[str]()
    for component in checkpoint.components:
        for file in component.files:
            metadata = read_header(file.path).metadata
            kind = metadata.get("statistics", kind)
            shared |= _parsed(metadata, "shared", dict, "a JSON object of strings", file)
            transposed |= set(_parsed(metadata, "transposed", list, "a JSON list", file))
    return Statistics(model.label, key, model, kind, shared, frozenset(transposed))


def _parsed(
    metadata: Mapping[str, str], key: str, kind: type, expected: str, file: WeightFile
) -> Any:
    """Return a metadata entry that is JSON, empty if it is not there."""
    if key not in metadata:
        return kind()
    problem = f"its metadata have {key}: {shown(metadata[key])}, expected {expected}"
    wrong = CheckpointError(problem, where=str(file.path), hint=COLLECT_AGAIN)
    try:
        found = json.loads(metadata[key])
    except (ValueError, RecursionError) as exc:
        raise wrong from exc
    texts = found.values() if isinstance(found, dict) else found
    if not isinstance(found, kind) or not all(isinstance(text, str) for text in texts):
        raise wrong
    return found
