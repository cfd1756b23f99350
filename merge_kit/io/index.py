"""The index of a sharded checkpoint, and whether it and the shards tell the same."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from merge_kit.core.names import natural_key
from merge_kit.errors import CheckpointError
from merge_kit.io.small_files import read_bytes
from merge_kit.io.strict_json import is_printable, parse_object, shown

MAX_INDEX_BYTES = 100_000_000
_FETCH = "is the download complete? fetch the index and all shards again"


@dataclass(frozen=True, slots=True)
class Index:
    """Which shard holds which tensor, as `*.index.json` says.

    Attributes:
        weight_map: Tensor -> name of a file in the same folder.
        total_size: Bytes of all tensors, or None if the index does not say.
    """

    path: Path
    weight_map: Mapping[str, str]
    total_size: int | float | None

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the shards in the order of their numbers."""
        return tuple(sorted(set(self.weight_map.values()), key=natural_key))


def read_index(path: Path, suffixes: tuple[str, ...] = (".safetensors",)) -> Index:
    """Return what an index file says.

    Args:
        suffixes: Endings that a shard's name may have.

    Raises:
        CheckpointError: If it cannot be read, is no index, or points out of its folder.
    """
    where = str(path)
    found = parse_object(read_bytes(path, MAX_INDEX_BYTES), where=where, what="index")
    weight_map = found.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        problem = f"weight_map is {shown(weight_map)}, expected an object of tensor: shard"
        raise CheckpointError(problem, where=where, hint=_FETCH)
    for tensor in weight_map:
        if not is_printable(tensor):
            problem = f"tensor name {shown(tensor)} holds a control character"
            raise CheckpointError(problem, where=where, hint="rename the tensor")
    for shard in weight_map.values():
        if not isinstance(shard, str):
            problem = f"weight_map names {shown(shard)}, expected the name of a file"
            raise CheckpointError(problem, where=where, hint=_FETCH)
    for shard in set(weight_map.values()):
        _check_shard(shard, suffixes, where)
    return Index(path, weight_map, _total_size(found.get("metadata")))


def _total_size(metadata: object) -> int | float | None:
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return total if isinstance(total, int | float) and not isinstance(total, bool) else None


def _check_shard(shard: str, suffixes: tuple[str, ...], where: str) -> None:
    if "/" in shard or "\\" in shard:
        problem = f"shard {shown(shard)} is outside the model's folder, expected a plain name"
        raise CheckpointError(problem, where=where, hint="do not use this checkpoint")
    if not shard.endswith(suffixes) or not is_printable(shard):
        expected = " or ".join(suffixes)
        problem = f"shard {shown(shard)} is no weight file, expected a name that ends in {expected}"
        raise CheckpointError(problem, where=where, hint=_FETCH)


def check_shards_exist(index: Index, names: Collection[str]) -> None:
    """Check that every shard is there.

    Args:
        names: Files of the index's folder.

    Raises:
        CheckpointError: If some are missing; the first five are named.
    """
    missing = [shard for shard in index.shards if shard not in names]
    if missing:
        problem = f"{len(missing)} of its {len(index.shards)} shards are missing: {few(missing)}"
        raise CheckpointError(problem, where=str(index.path), hint=_FETCH)


def check_tensors(index: Index, held: Mapping[str, Collection[str]]) -> None:
    """Check that index and shards name the same tensors in the same places.

    Args:
        held: Shard -> names of the tensors in it.

    Raises:
        CheckpointError: If they do not; the first five tensors are named.
    """
    weight_map, where = index.weight_map, str(index.path)
    absent = [f"{t} ({s})" for t, s in weight_map.items() if t not in held[s]]
    if absent:
        problem = f"{len(absent)} tensors are not in the shard it names: {few(absent)}"
        raise CheckpointError(problem, where=where, hint=_FETCH)
    extra = [f"{t} ({s})" for s, tensors in held.items() for t in tensors if t not in weight_map]
    if extra:
        problem = f"{len(extra)} tensors of the shards are not in the index: {few(extra)}"
        raise CheckpointError(problem, where=where, hint=_FETCH)


def check_once(held: Mapping[str, Collection[str]], where: str) -> None:
    """Check that no tensor is in two shards.

    Args:
        held: Shard -> names of the tensors in it.

    Raises:
        CheckpointError: If some are; the first five tensors are named.
    """
    first: dict[str, str] = {}
    twice = []
    for shard, tensors in held.items():
        for tensor in tensors:
            other = first.setdefault(tensor, shard)
            if other != shard:
                twice.append(f"{tensor} ({other} and {shard})")
    if twice:
        problem = f"{len(twice)} tensors are in two shards: {few(twice)}"
        raise CheckpointError(problem, where=where, hint="save the checkpoint again")


def size_warning(index: Index, total_bytes: int) -> str:
    """Return what is odd about the size that the index states, or ""."""
    if index.total_size is None:
        return f"{index.path.name} states no metadata.total_size; the shards were counted"
    if index.total_size == total_bytes:
        return ""
    stated = f"{index.path.name} states a total_size of {index.total_size} bytes"
    return f"{stated}, the shards hold {total_bytes}; the shards were believed"


def few(names: Iterable[str], most: int = 5) -> str:
    """Return the first names of many, for a message."""
    listed = list(itertools.islice(names, most + 1))
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")
