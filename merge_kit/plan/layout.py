"""Output tensors in shards, each at its byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from merge_kit.io.layout import build_header, build_index, index_name, plan_shards, shard_names
from merge_kit.plan.models import Part
from merge_kit.plan.steps import Made
from merge_kit.plan.values import Shard, SideFile, Step, Target


def place(
    parts: Sequence[Part], made: Sequence[Made], shard_size_bytes: int
) -> tuple[list[Step], list[Shard], list[SideFile]]:
    """Return steps with their targets in write order, the shards, and the index files."""
    components = [m.held.component for m in made]
    return place_steps(parts, [m.step for m in made], shard_size_bytes, components)


def place_steps(
    parts: Sequence[Part],
    steps: Sequence[Step],
    shard_size_bytes: int,
    components: Sequence[str] | None = None,
    metadata: Mapping[str, Mapping[str, str]] | None = None,
) -> tuple[list[Step], list[Shard], list[SideFile]]:
    """Return steps with their targets in write order, the shards, and the index files.

    Args:
        parts: The folders of the output, in the order in which they are written.
        components: The folder of each step's output; by default, of each output, what its key has
            in front of its name.
        metadata: Free text by key for the files of a folder.
    """
    placed = [list(step.outputs) for step in steps]
    folders: dict[str, list[tuple[int, int]]] = {part.path: [] for part in parts}
    for i, targets in enumerate(placed):
        for j, target in enumerate(targets):
            folder = components[i] if components else _folder(target)
            if folder in folders:
                folders[folder].append((i, j))
    order: dict[int, None] = {}
    shards: list[Shard] = []
    indexes: list[SideFile] = []
    for part in parts:
        own = folders[part.path]
        specs = [placed[i][j].spec for i, j in own]
        groups = plan_shards(specs, shard_size_bytes) if own else []
        names = shard_names(part.stem, len(groups))
        weight_map = {}
        for name, members in zip(names, groups, strict=True):
            header, offsets = build_header(
                [specs[m] for m in members], (metadata or {}).get(part.path)
            )
            end = len(header)
            for m, offset in zip(members, offsets, strict=True):
                i, j = own[m]
                target = placed[i][j]
                placed[i][j] = Target(target.key, target.spec, len(shards), offset)
                order.setdefault(i)
                end = max(end, offset + target.spec.nbytes)
                weight_map[specs[m].name] = name
            shards.append(Shard(_inside(part, name), header, end))
        if len(groups) > 1:
            text = build_index(weight_map, sum(spec.nbytes for spec in specs))
            indexes.append(SideFile(_inside(part, index_name(part.stem)), None, text))
    return [replace(steps[i], outputs=tuple(placed[i])) for i in order], shards, indexes


def _folder(target: Target) -> str:
    return target.key.removesuffix(target.spec.name).removesuffix("/")


def _inside(part: Part, name: str) -> str:
    return f"{part.path}/{name}" if part.path else name
