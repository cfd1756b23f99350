"""Opening a model on disk: a folder, a single file, or a folder of components."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from merge_kit.errors import CheckpointError
from merge_kit.io.component import Opened, open_component, read_weights
from merge_kit.io.families import PICKLED, SAFETENSORS, STEMS, families, is_index
from merge_kit.io.folder import Listing, joined, list_folder
from merge_kit.io.side_files import (
    gguf_only,
    no_weights,
    pickled_only,
    split_side_files,
    unread_pickles,
)
from merge_kit.io.strict_json import shown
from merge_kit.io.values import Checkpoint, Component

_ONE_SHARD = re.compile(r".+-(\d+)-of-(\d+)\.safetensors")


def open_checkpoint(path: Path, name: str | None = None) -> Checkpoint:
    """Return what is at a path, read from headers and config files only.

    Accepted are one safetensors file, and a folder with weights in itself, in its subfolders down
    to three levels (diffusers, sentence-transformers), or both. Of several sets of weights in one
    folder, `model` is used before `diffusion_pytorch_model`, `adapter_model`, and any other.

    Args:
        name: What the output calls this model; default: the folder's name, or the file's stem.

    Raises:
        CheckpointError: If nothing is there, or it is broken, incomplete or not supported.
        Problems: If several files are broken.
    """
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError) as exc:
        raise CheckpointError(
            "there is no such folder or file here",
            where=str(path),
            hint=f"download it first: hf download {_hub_id(path)} --local-dir DIR",
        ) from exc
    except OSError as exc:
        problem = f"cannot open: {exc.strerror}"
        raise CheckpointError(problem, where=str(path), hint="check path and permissions") from exc
    return _open_folder(path, name) if is_folder else _open_file(path, name)


def _hub_id(path: Path) -> str:
    return str(path) if len(path.parts) == 2 and not path.is_absolute() else "org/name"


def _name_of(folder: Path) -> str:
    """Return the folder's name; in the Hub's cache, the repository's, not the revision."""
    real = Path(os.path.realpath(folder))
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        return real.parent.parent.name.rpartition("--")[2]
    return real.name or "model"


def _open_file(path: Path, name: str | None) -> Checkpoint:
    if path.suffix.lower() in PICKLED:
        raise pickled_only(path, [path.name])
    if path.suffix.lower() == ".gguf":
        raise gguf_only(path, path.name)
    if is_index(path.name):
        problem = "is an index, expected a .safetensors file or a folder"
        raise CheckpointError(problem, where=str(path), hint=f"name its folder, {path.parent}")
    if not path.name.endswith(SAFETENSORS):
        problem = "is no .safetensors file"
        raise CheckpointError(problem, where=str(path), hint="name a .safetensors file or a folder")
    shard = _ONE_SHARD.fullmatch(path.name)
    if shard and int(shard[2]) > 1:
        problem = f"is one of {int(shard[2])} shards, expected all of them"
        raise CheckpointError(problem, where=str(path), hint=f"name its folder, {path.parent}")
    files = read_weights([(path.name, path)])
    tensors = {t.spec.name: t for found in files.values() for t in found}
    stem = path.stem if path.stem in STEMS else STEMS[0]  # a name of its own is no stem of shards
    component = Component("", stem, tuple(files), tensors, None)
    return _checked(Checkpoint(path, name or path.stem, True, (component,), (), {}, ()))


def _open_folder(root: Path, name: str | None) -> Checkpoint:
    listing = list_folder(root)
    _refuse_cache(listing)
    folders = [folder for folder, names in listing.files.items() if families(names)]
    if not folders:
        raise no_weights(listing)
    folders = _components(listing, folders)
    opened = [open_component(listing, folder) for folder in folders]
    used = {file.name for o in opened for file in o.component.files}
    side_files, left_out = split_side_files(listing, used)
    for o in opened:
        left_out |= o.left_out
    return _checked(
        Checkpoint(
            root=root,
            name=name or _name_of(root),
            is_file=False,
            components=tuple(o.component for o in opened),
            side_files=side_files,
            left_out=dict(sorted(left_out.items())),
            warnings=_warnings(listing, folders, opened),
        )
    )


def _components(listing: Listing, folders: list[str]) -> list[str]:
    """Return the folders that are components, the root first.

    Beside the components of a diffusers pipeline, the root often holds the same weights once more
    as one file; those are left out.
    """
    names = listing.files.get("", ())
    doubled = "model_index.json" in names and not set(STEMS) & set(families(names))
    if doubled and folders != [""]:
        folders = [folder for folder in folders if folder]
    return sorted(folders)


def _warnings(
    listing: Listing, folders: Sequence[str], opened: Sequence[Opened]
) -> tuple[str, ...]:
    found = [warning for o in opened for warning in o.warnings]
    if "" not in folders:
        root_files = (f for fam in families(listing.files.get("", ())).values() for f in fam.files)
        found += [f"{file} is left out: the pipeline's folders are used" for file in root_files]
    for path, why in listing.unusable.items():
        if "training run" in why:
            found.append(f"{path} is left out: {why}")
    for pickle in unread_pickles(listing):
        if pickle.rpartition("/")[0] not in folders:
            found.append(f"{pickle} is left out: pickled, and no safetensors file stands for it")
    return tuple(found)


def _refuse_cache(listing: Listing) -> None:
    """Refuse a repository of the Hub's cache; its snapshots are the models."""
    revisions = sorted({f.split("/")[1] for f in listing.files if f.startswith("snapshots/")})
    if not revisions or "blobs" not in listing.files:
        return
    snapshot = listing.root / "snapshots" / revisions[0]
    problem = f"is a repository of the Hub's cache with {len(revisions)} snapshots"
    raise CheckpointError(problem, where=str(listing.root), hint=f"name a snapshot: {snapshot}")


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    if not any(component.tensors for component in checkpoint.components):
        problem = "holds no tensors, expected at least one"
        raise CheckpointError(problem, where=str(checkpoint.root), hint="is it the right file?")
    _refuse_same_keys(checkpoint)
    return checkpoint


def _refuse_same_keys(checkpoint: Checkpoint) -> None:
    """Refuse `b` in folder `a` beside `a/b` in the root: one of the two would be lost."""
    if len(checkpoint.components) == 1:
        return
    seen: dict[str, str] = {}
    for component in checkpoint.components:
        place = component.path or "the root"
        for name in component.tensors:
            key = joined(component.path, name)
            other = seen.setdefault(key, place)
            if other != place:
                problem = f"tensor {shown(key)} is both in {other} and in {place}"
                raise CheckpointError(
                    problem, where=str(checkpoint.root), hint="rename one of them"
                )
