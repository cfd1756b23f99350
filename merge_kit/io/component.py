"""The weights of one folder: the files chosen, their headers read and checked together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from merge_kit.core.tensors import StoredTensor
from merge_kit.errors import CheckpointError, raise_all
from merge_kit.io.families import STEMS, Family, choose, families, is_variant, whole_set
from merge_kit.io.folder import Listing, joined
from merge_kit.io.header import read_header
from merge_kit.io.index import (
    Index,
    check_once,
    check_shards_exist,
    check_tensors,
    read_index,
    size_warning,
)
from merge_kit.io.small_files import read_config
from merge_kit.io.values import Component, WeightFile


@dataclass(frozen=True, slots=True)
class Opened:
    """A component, and what was noticed about its folder.

    Attributes:
        left_out: Weight files that are not used, relative to the root, and why.
        warnings: One sentence each.
    """

    component: Component
    left_out: Mapping[str, str]
    warnings: tuple[str, ...]


def open_component(listing: Listing, folder: str) -> Opened:
    """Return the weights of a folder that holds at least one safetensors file or index.

    Args:
        folder: Relative to the listing's root, "" for the root itself.

    Raises:
        CheckpointError: If files are missing, broken, or contradict one another.
    """
    place, names = listing.root / folder, listing.files[folder]
    found = families(names)
    family = choose(found, STEMS, place)
    index = read_index(listing.path(joined(folder, family.index))) if family.index else None
    used = _indexed(family, index, names) if index else whole_set(family, place)
    files = [(joined(folder, name), listing.path(joined(folder, name))) for name in used]
    read = read_weights(files)
    warnings = _check(index, dict(zip(used, read.values(), strict=True)), place)
    config = joined(folder, "config.json")
    component = Component(
        path=folder,
        stem=family.stem,
        files=tuple(read),
        tensors={t.spec.name: t for tensors in read.values() for t in tensors},
        config_text=read_config(listing.path(config)) if "config.json" in names else None,
    )
    left_out = _left_out(folder, found, family, used)
    warnings.extend(f"{name} is left out: {why}" for name, why in left_out.items())
    return Opened(component, left_out, tuple(warnings))


def _indexed(family: Family, index: Index, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the files that an index names."""
    stray = [name for name in family.singles if name not in index.shards]
    if stray:
        problem = f"names shards, but {stray[0]} is there too and is not among them"
        raise CheckpointError(
            problem, where=str(index.path), hint=f"remove the index or {stray[0]}, or name one file"
        )
    check_shards_exist(index, names)
    return index.shards


def read_weights(files: list[tuple[str, Path]]) -> dict[WeightFile, tuple[StoredTensor, ...]]:
    """Return files as they are now, with their tensors.

    Args:
        files: Name relative to the root, and path.

    Raises:
        CheckpointError: If one of them is broken.
        Problems: If several are.
    """
    read, errors = {}, []
    for name, path in files:
        try:
            # Status first: a file that changes later has another one, and the reader notices.
            status = path.stat()
            file = WeightFile(
                name,
                path,
                status.st_size,
                status.st_mtime_ns,
                inode=status.st_ino,
                ctime_ns=status.st_ctime_ns,
            )
            read[file] = read_header(path).tensors
        except CheckpointError as exc:
            errors.append(exc)
        except OSError as exc:
            problem = f"cannot open: {exc.strerror}"
            errors.append(CheckpointError(problem, where=str(path), hint="was it moved?"))
    raise_all(errors)
    return read


def _check(
    index: Index | None, read: Mapping[str, tuple[StoredTensor, ...]], place: Path
) -> list[str]:
    """Check shards against one another and the index, and return warnings."""
    held = {name: {t.spec.name: t for t in tensors} for name, tensors in read.items()}
    check_once(held, where=str(place))
    if index is None:
        return []
    check_tensors(index, held)
    total = sum(t.spec.nbytes for tensors in read.values() for t in tensors)
    warning = size_warning(index, total)
    return [warning] if warning else []


def _left_out(
    folder: str, found: Mapping[str, Family], family: Family, used: tuple[str, ...]
) -> dict[str, str]:
    left_out = {}
    for other in found.values():
        if other is family:
            why = "not named by the index"
        elif is_variant(other.stem, found):
            why = "a variant of the weights that are used"
        else:
            why = f"the weights that are used are those named {family.stem}"
        left_out.update({joined(folder, f): why for f in other.files if f not in used})
    return left_out
