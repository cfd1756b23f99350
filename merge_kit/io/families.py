"""Which weight files of a folder belong together, and which of several sets is the model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_kit.core.names import natural_key
from merge_kit.errors import CheckpointError
from merge_kit.io.index import few

SAFETENSORS = (".safetensors",)
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
STEMS = ("model", "diffusion_pytorch_model", "adapter_model")
"""Stems that loaders look for, the first wins."""

_SHARD = re.compile(r"(.+?)(?:\.safetensors)?-(\d{1,9})-of-(\d{1,9})(?:\.([^.]+))?")
_INDEX = re.compile(r"(.+?)(\.(?:safetensors|bin|pt|pth|h5|msgpack))\.index(?:\.([^.]+))?\.json")


@dataclass(frozen=True, slots=True)
class Numbered:
    """A shard: `number` of `total`, as its name says."""

    name: str
    number: int
    total: int


@dataclass(frozen=True, slots=True)
class Family:
    """Weight files of one folder with a common stem; at least one of the three is there.

    Attributes:
        index: Name of the index, or "".
        singles: Files without a number (more than one only where several suffixes are looked for).
        shards: Files with a number.
    """

    stem: str
    index: str
    singles: tuple[str, ...]
    shards: tuple[Numbered, ...]

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.singles, *(shard.name for shard in self.shards))


def is_index(name: str) -> bool:
    """Return whether a file is the index of sharded weights, of whatever format."""
    return _INDEX.fullmatch(name) is not None


def families(names: Iterable[str], suffixes: tuple[str, ...] = SAFETENSORS) -> dict[str, Family]:
    """Return the families among the files of one folder, by stem."""
    found: dict[str, Family] = {}
    for name in names:
        family = _family_of(name, suffixes)
        if family is None:
            continue
        old = found.get(family.stem, Family(family.stem, "", (), ()))
        singles, shards = old.singles + family.singles, old.shards + family.shards
        found[family.stem] = Family(family.stem, family.index or old.index, singles, shards)
    return found


def _family_of(name: str, suffixes: tuple[str, ...]) -> Family | None:
    """Return the family that has this file only, or None if it is no weight file."""
    index = _INDEX.fullmatch(name)
    if index:
        stem = _with_variant(index[1], index[3])
        return Family(stem, name, (), ()) if index[2] in suffixes else None
    suffix = next((suffix for suffix in suffixes if name.endswith(suffix)), "")
    if not suffix or name == suffix:
        return None
    whole = name.removesuffix(suffix)
    shard = _SHARD.fullmatch(whole)
    if shard is None:
        return Family(whole, "", (name,), ())
    numbered = Numbered(name, int(shard[2]), int(shard[3]))
    return Family(_with_variant(shard[1], shard[4]), "", (), (numbered,))


def _with_variant(stem: str, variant: str | None) -> str:
    return f"{stem}.{variant}" if variant else stem


def choose(found: Mapping[str, Family], stems: Sequence[str], folder: Path) -> Family:
    """Return the family that is the model, of at least one.

    Raises:
        CheckpointError: If several may be it.
    """
    for stem in stems:
        if stem in found:
            return found[stem]
    left = [family for family in found.values() if not is_variant(family.stem, found)]
    if len(left) > 1:
        named = few(file for family in left for file in family.files or (family.index,))
        problem = f"holds several sets of weights, expected one: {named}"
        raise CheckpointError(problem, where=str(folder), hint="name one file instead")
    return left[0]


def is_variant(stem: str, found: Collection[str]) -> bool:
    """Return whether `model.fp16` stands beside `model`."""
    return any(stem[:i] in found for i, letter in enumerate(stem) if letter == ".")


def whole_set(family: Family, folder: Path) -> tuple[str, ...]:
    """Return the files of a family without an index, shards in order.

    Raises:
        CheckpointError: If shards are missing, or files of two sets are mixed.
    """
    if (family.singles and family.shards) or len(family.singles) > 1:
        one, other = (*family.singles, *(shard.name for shard in family.shards))[:2]
        problem = f"holds {one} and {other}, two sets of the same weights, expected one"
        raise CheckpointError(problem, where=str(folder), hint="remove one, or name a file")
    if not family.shards:
        return family.singles
    ordered = sorted(family.shards, key=lambda shard: natural_key(shard.name))
    totals = sorted({shard.total for shard in ordered})
    if len(totals) > 1:
        problem = f"holds shards of sets of {totals[0]} and of {totals[1]}, expected one set"
        raise CheckpointError(problem, where=str(folder), hint="remove one of the sets")
    numbers = {shard.number for shard in ordered}
    if not len(ordered) == len(numbers) == max(numbers) == totals[0] or 0 in numbers:
        absent = (str(number) for number in range(1, totals[0] + 1) if number not in numbers)
        listed = few(absent) or "none, but numbers repeat"
        problem = f"holds {len(ordered)} of {totals[0]} shards, absent are {listed}"
        raise CheckpointError(problem, where=str(folder), hint="is the download complete?")
    return tuple(shard.name for shard in ordered)
