"""Output tensors in shards, each at its byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from merge_kit.io.layout import build_header, build_index, plan_shards, shard_names
from merge_kit.plan.models import Part
from merge_kit.plan.steps import Made
from merge_kit.plan.values import Shard, SideFile, Step, Target


def place(
    parts: Sequence[Part], made: Sequence[Made], shard_size_bytes: int
) -> tuple[list[Step], list[Shard], list[SideFile]]:
    """Return steps with their targets in write order, the shards, and the index files."""
    steps: list[Step] = []
    shards: list[Shard] = []
    indexes: list[SideFile] = []
    for part in parts:
        own = [m for m in made if m.held.component == part.path]
        specs = [m.step.outputs[0].spec for m in own]
        groups = plan_shards(specs, shard_size_bytes) if own else []
        names = shard_names(part.stem, len(groups))
        weight_map = {}
        for name, members in zip(names, groups, strict=True):
            header, offsets = build_header([specs[i] for i in members])
            end = len(header)
            for i, offset in zip(members, offsets, strict=True):
                target = own[i].step.outputs[0]
                placed = Target(target.key, target.spec, len(shards), offset)
                steps.append(replace(own[i].step, outputs=(placed,)))
                end = max(end, offset + target.spec.nbytes)
                weight_map[specs[i].name] = name
            shards.append(Shard(_inside(part, name), header, end))
        if len(groups) > 1:
            text = build_index(weight_map, sum(spec.nbytes for spec in specs))
            indexes.append(
                SideFile(_inside(part, f"{part.stem}.safetensors.index.json"), None, text)
            )
    return steps, shards, indexes


def _inside(part: Part, name: str) -> str:
    return f"{part.path}/{name}" if part.path else name
