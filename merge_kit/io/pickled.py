"""Finding pickled weights, by names alone: nothing here opens one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from merge_kit.errors import CheckpointError
from merge_kit.io.families import (
    PICKLED,
    SAFETENSORS,
    STEMS,
    Family,
    choose,
    families,
    is_index,
    whole_set,
)
from merge_kit.io.folder import Listing, joined, list_folder
from merge_kit.io.index import check_shards_exist, read_index
from merge_kit.io.side_files import split_side_files, why_left_out
from merge_kit.io.small_files import read_config

_STEMS = ("pytorch_model", *STEMS)
_STALE = why_left_out("x.bin")


@dataclass(frozen=True, slots=True)
class PickledPart:
    """The pickled weights of one folder.

    Attributes:
        folder: Relative to the source, "" for the source itself.
        stem: Stem of the safetensors files to write.
        files: At least one, in order.
        weight_map: Tensor -> file name, as an index says; empty without one.
        tied: Whether the config says that the head is the embedding.
    """

    folder: str
    stem: str
    files: tuple[Path, ...]
    weight_map: Mapping[str, str]
    tied: bool


@dataclass(frozen=True, slots=True)
class Pickled:
    """A checkpoint with pickled weights.

    Attributes:
        parts: At least one.
        copied: Other files that belong to the model, relative to the source -> path.
    """

    parts: tuple[PickledPart, ...]
    copied: Mapping[str, Path]


def find_pickled(source: Path) -> Pickled:
    """Return what is to be converted: a pickled file, or a folder with some, like a checkpoint.

    Raises:
        CheckpointError: If there is none, or it is incomplete.
    """
    if source.is_dir():
        return _in_folder(list_folder(source))
    if not source.exists():
        problem = "there is no such folder or file here"
        raise CheckpointError(problem, where=str(source), hint="check the path")
    if not source.name.lower().endswith(PICKLED):
        problem = f"is no pickled checkpoint, expected a name that ends in {', '.join(PICKLED)}"
        raise CheckpointError(problem, where=str(source), hint="name a pickled file or a folder")
    stem = _output_stem(source.stem)
    return Pickled((PickledPart("", stem, (source,), {}, tied=False),), {})


def _output_stem(stem: str) -> str:
    return stem if stem in STEMS else "model"


def _in_folder(listing: Listing) -> Pickled:
    parts: list[PickledPart] = []
    weights: set[str] = set()
    for folder, names in listing.files.items():
        if families(names):  # pickles beside safetensors are the same weights again
            weights.update(joined(folder, n) for n in names if n.endswith(SAFETENSORS))
            weights.update(joined(folder, f.index) for f in families(names).values() if f.index)
            continue
        found = families([n for n in names if is_index(n) or why_left_out(n) == _STALE], PICKLED)
        if found:
            family = choose(found, _STEMS, listing.root / folder)
            parts.append(_part(listing, folder, family))
    if not parts:
        problem = "holds no pickled weights that lack a safetensors file beside them"
        raise CheckpointError(
            problem,
            where=str(listing.root),
            hint="name a pickled file itself to convert it all the same",
        )
    side_files, left_out = split_side_files(listing, weights)
    cards = [name for name in left_out if name.lower() == "readme.md"]
    copied = {name: listing.path(name) for name in sorted({*side_files, *cards, *weights})}
    return Pickled(tuple(parts), copied)


def _part(listing: Listing, folder: str, family: Family) -> PickledPart:
    place, weight_map = listing.root / folder, {}
    if family.index:
        index = read_index(listing.path(joined(folder, family.index)), PICKLED)
        check_shards_exist(index, listing.files[folder])
        names, weight_map = index.shards, dict(index.weight_map)
    else:
        names = whole_set(family, place)
    files = tuple(listing.path(joined(folder, name)) for name in names)
    return PickledPart(folder, _output_stem(family.stem), files, weight_map, _tied(listing, folder))


def _tied(listing: Listing, folder: str) -> bool:
    """Return whether config.json says so; a config that is no JSON says nothing."""
    if "config.json" not in listing.files[folder]:
        return False
    try:
        config = json.loads(read_config(listing.path(joined(folder, "config.json"))))
    except (ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("tie_word_embeddings") is True
