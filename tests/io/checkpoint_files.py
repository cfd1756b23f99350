"""Small checkpoints for tests, written byte by byte."""

from __future__ import annotations

import json
from pathlib import Path

from merge_kit.core.tensors import TensorSpec
from merge_kit.io.layout import build_header


def write_weights(path: Path, *names: str) -> None:
    """Write a file with float32 tensors of two elements."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header, _ = build_header([TensorSpec(name, "F32", (2,)) for name in names])
    path.write_bytes(header + bytes(8 * len(names)))


def write_index(path: Path, weight_map: dict[str, str], **more: object) -> None:
    """Write an index that states the right size, or what `more` says."""
    index = {"metadata": {"total_size": 8 * len(weight_map)}, "weight_map": weight_map, **more}
    path.write_text(json.dumps({k: v for k, v in index.items() if v is not None}))


def write_sharded(folder: Path) -> None:
    """Write tensors a, b and c in two shards with their index."""
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    write_weights(folder / first, "a", "b")
    write_weights(folder / second, "c")
    write_index(folder / "model.safetensors.index.json", {"a": first, "b": first, "c": second})
