"""Where the bytes of an output go: shards, their names, headers, offsets, and the index.

The output depends on the tensors and their order alone, so that equal merges are equal files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from operator import itemgetter

from merge_kit.core.dtypes import DTYPES
from merge_kit.core.sizes import format_size
from merge_kit.core.tensors import TensorSpec
from merge_kit.errors import PlanError
from merge_kit.io.header import MAX_HEADER_BYTES, PREFIX_BYTES

ALIGNMENT = 64
"""The data of a shard starts at a multiple of these bytes."""


def build_header(
    tensors: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, tuple[int, ...]]:
    """Return the first bytes of a safetensors file and the offset of each tensor in the file.

    Args:
        tensors: In the order of their bytes; names are unique and none is `__metadata__`.
        metadata: Free text by key, beside the format.

    Raises:
        PlanError: If the header is longer than the format allows.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    starts, stop = [], 0
    for tensor in tensors:
        assert tensor.name not in entries, tensor.name
        start, stop = stop, stop + tensor.nbytes
        starts.append(start)
        offsets = [start, stop]
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(PREFIX_BYTES + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        has, most = format_size(len(text)), format_size(MAX_HEADER_BYTES)
        problem = f"a shard's header takes {has}, at most {most} are allowed"
        raise PlanError(problem, hint="lower --shard-size")
    header = len(text).to_bytes(PREFIX_BYTES, "little") + text
    return header, tuple(len(header) + start for start in starts)


def shard_names(stem: str, count: int) -> list[str]:
    """Return the names of so many weight files, as loaders look for them."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def index_name(stem: str) -> str:
    """Return the name of the index beside more than one shard."""
    return f"{stem}.safetensors.index.json"


def plan_shards(specs: Sequence[TensorSpec], limit_bytes: int) -> list[list[int]]:
    """Return shards as lists of positions in `specs`, at least one shard.

    Shards are filled in the order given; a tensor above the limit has a shard of its own. Within
    a shard wide dtypes come first, so that every tensor starts at a multiple of its element.

    Args:
        limit_bytes: Most bytes of tensors in one shard.
    """
    shards: list[list[int]] = [[]]
    held = 0
    for position, spec in enumerate(specs):
        if shards[-1] and held + spec.nbytes > limit_bytes:
            shards.append([])
            held = 0
        shards[-1].append(position)
        held += spec.nbytes
    for shard in shards:
        shard.sort(key=lambda position: -DTYPES[specs[position].dtype].bits)  # a stable sort
    return shards


def build_index(weight_map: Mapping[str, str], total_size: int) -> str:
    """Return the text of the index.

    Args:
        weight_map: Tensor -> name of its shard.
        total_size: Bytes of all tensors.
    """
    index = {
        "metadata": {"total_size": total_size},
        "weight_map": dict(sorted(weight_map.items(), key=itemgetter(0))),
    }
    return json.dumps(index, indent=2, ensure_ascii=False) + "\n"
