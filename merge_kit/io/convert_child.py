"""The process that opens pickles for `mergekit convert`: JSON in, safetensors and JSON out."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_kit.errors import CheckpointError, MergeKitError, OutputError
from merge_kit.io.layout import build_header, build_index, index_name, plan_shards, shard_names
from merge_kit.io.unpickling import Part, Survey, load_tensors, survey, tensor_bytes
from merge_kit.io.writer import Writer


def main() -> None:
    """Answer one request: {tensors, notes}, or {problem, where, hint, is_output}."""
    try:
        answer = convert(json.load(sys.stdin))
    except (CheckpointError, OutputError) as exc:
        answer = _described(exc)
    json.dump(answer, sys.stdout)


def _described(exc: MergeKitError) -> dict[str, Any]:
    is_output = isinstance(exc, OutputError)
    return {"problem": exc.problem, "where": exc.where, "hint": exc.hint, "is_output": is_output}


def convert(job: Mapping[str, Any]) -> dict[str, Any]:
    """Write the parts of a job, and return the number of tensors and the notes.

    Raises:
        CheckpointError: If a file is refused or does not hold tensors alone.
        OutputError: If the disk refuses.
    """
    tensors = 0
    notes: list[str] = []
    for described in job["parts"]:
        part = Part(
            stem=described["stem"],
            files=tuple(Path(file) for file in described["files"]),
            weight_map=described["weight_map"],
            tied=described["tied"],
        )
        surveyed = survey(part)
        output = Path(job["output"]) / described["folder"]
        _write(part, surveyed, output, job["shard_size_bytes"])
        tensors += len(surveyed.specs)
        notes.extend(surveyed.notes)
    return {"tensors": tensors, "notes": notes}


def _write(part: Part, surveyed: Survey, output: Path, shard_size_bytes: int) -> None:
    """Write all shards; each pickled file is loaded once, whichever shards it fills."""
    shards = plan_shards(surveyed.specs, shard_size_bytes)
    names = shard_names(part.stem, len(shards))
    places: dict[str, tuple[Path, int]] = {}
    with Writer() as writer:
        for name, shard in zip(names, shards, strict=True):
            specs = [surveyed.specs[position] for position in shard]
            header, offsets = build_header(specs)
            size = len(header) + sum(spec.nbytes for spec in specs)
            writer.create(output / name, size, header)
            starts = zip(specs, offsets, strict=True)
            places.update({spec.name: (output / name, start) for spec, start in starts})
        for file in part.files:
            for name, tensor in load_tensors(file).tensors.items():
                if name in places:  # a tied head is not
                    writer.write(*places[name], tensor_bytes(tensor))
        if len(names) > 1:
            total = sum(spec.nbytes for spec in surveyed.specs)
            text = build_index({name: path.name for name, (path, _) in places.items()}, total)
            index = output / index_name(part.stem)
            writer.create(index, len(text.encode()), text.encode())
        writer.sync()
