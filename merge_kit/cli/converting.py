"""`mergekit convert`."""

from __future__ import annotations

from pathlib import Path

from merge_kit.cli.text import print_json
from merge_kit.io.convert import convert_pickled
from merge_kit.plan.describe import plural


def convert_weights(pickled: Path, output: Path, shard_bytes: int, *, as_json: bool) -> None:
    """Convert pickled weights and print what became of them."""
    found = convert_pickled(pickled, output, shard_bytes)
    if as_json:
        notes = list(found.notes)
        print_json({"output": str(found.output), "tensors": found.tensors, "notes": notes})
        return
    print(f"converted {plural(found.tensors, 'tensor')}")
    for note in found.notes:
        print(f"note: {note}")
    print(f"output: {found.output}")
