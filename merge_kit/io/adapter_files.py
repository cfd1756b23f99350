"""The files of an adapter: its weights, and the text that says how they are to be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_kit.errors import CheckpointError
from merge_kit.io.checkpoint import _name_of as name_of_folder
from merge_kit.io.checkpoint import open_checkpoint
from merge_kit.io.component import open_component
from merge_kit.io.families import PICKLED, STEMS, Family, choose, families
from merge_kit.io.folder import Listing, list_folder
from merge_kit.io.header import read_header
from merge_kit.io.index import few
from merge_kit.io.side_files import no_weights, pickled_only, split_side_files
from merge_kit.io.small_files import read_bytes
from merge_kit.io.strict_json import parse_object
from merge_kit.io.values import Checkpoint

CONFIG = "adapter_config.json"
STEM = "adapter_model"
METADATA = "lora_adapter_metadata"
"""Key of a file's own metadata under which diffusers keeps the config."""

MAX_CONFIG_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The weights of an adapter and its config.

    Attributes:
        config: Keys as written, empty if there is none.
        config_text: Its text, None if there is none.
        config_where: Where it is, for messages.
        by_component: Whether it is diffusers', whose keys begin with the component's name.
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    config_text: str | None
    config_where: str
    by_component: bool = False


def open_files(path: Path, name: str | None) -> AdapterFiles:
    """Return the files of the adapter at a path: a folder or a single file.

    Raises:
        CheckpointError: If nothing is there, or it is broken, incomplete or pickled.
    """
    if not _is_folder(path):
        checkpoint = open_checkpoint(path, name)
        beside = path.parent / CONFIG
        if path.stem == STEM and beside.exists():
            return _with_config(checkpoint, beside)
        return _with_metadata(checkpoint)
    listing = list_folder(path)
    names = listing.files.get("", ())
    found = families(names)
    family = _family(listing, found)
    others = {file for one in found.values() if one is not family for file in _all(one)}
    kept = tuple(one for one in names if one not in others)
    alone = Listing(path, {"": kept}, listing.unusable)
    opened = open_component(alone, "")
    side_files, left_out = split_side_files(alone, {file.name for file in opened.component.files})
    left_out |= dict.fromkeys(others, "weights of the model, not of the adapter")
    checkpoint = Checkpoint(
        root=path,
        name=name or name_of_folder(path),
        is_file=False,
        components=(opened.component,),
        side_files=side_files,
        left_out=dict(sorted(left_out.items())),
        warnings=opened.warnings,
    )
    if CONFIG in names:
        return _with_config(checkpoint, listing.path(CONFIG))
    return _with_metadata(checkpoint)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # too long, not readable: opening it says so
        return False


def _all(family: Family) -> tuple[str, ...]:
    return (*family.files, family.index) if family.index else family.files


def _family(listing: Listing, found: Mapping[str, Family]) -> Family:
    """Return the adapter's weights among all of a folder."""
    names, where = listing.files.get("", ()), str(listing.root)
    if STEM in found:
        return found[STEM]
    if CONFIG in names:
        pickles = [one for one in names if one.startswith(STEM) and one.endswith(PICKLED)]
        if pickles:
            raise pickled_only(listing.root, pickles)
        others = few(file for one in found.values() for file in one.files)
        problem = f"holds {CONFIG}, but no {STEM}.safetensors"
        problem += f"; its weights are {others}" if others else ""
        raise CheckpointError(problem, where=where, hint="is the download complete?")
    if not found:
        raise no_weights(listing)
    return choose(found, STEMS, listing.root)


def _with_config(checkpoint: Checkpoint, path: Path) -> AdapterFiles:
    raw = read_bytes(path, MAX_CONFIG_BYTES)
    config = parse_object(raw, where=str(path), what=CONFIG)
    return AdapterFiles(checkpoint, config, raw.decode("utf-8"), str(path))


def _with_metadata(checkpoint: Checkpoint) -> AdapterFiles:
    for file in checkpoint.components[0].files:
        text = read_header(file.path).metadata.get(METADATA)
        if text is not None:
            where = f"{file.path}, __metadata__"
            config = parse_object(text.encode(), where=where, what=METADATA)
            return AdapterFiles(checkpoint, config, text, where, by_component=True)
    return AdapterFiles(checkpoint, {}, None, str(checkpoint.root))
