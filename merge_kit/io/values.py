"""What lies on disk: weight files, components, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from merge_kit.core.tensors import StoredTensor


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One safetensors file as it was when the plan was made.

    Attributes:
        name: Relative to the checkpoint's root, with forward slashes.
        nbytes: Its size.
        mtime_ns: Its modification time; a file that changes later stops the run.
        inode: Its number on its disk; another file of the same size and time has another.
        ctime_ns: When its content or status changed last, which no program can set.
    """

    name: str
    path: Path
    nbytes: int
    mtime_ns: int
    inode: int = 0
    ctime_ns: int = 0


@dataclass(frozen=True, slots=True)
class Component:
    """The weights of one folder of a checkpoint (most checkpoints have one component).

    Attributes:
        path: Folder relative to the checkpoint's root with forward slashes, "" for the root.
        stem: Stem of its weight files: "model", "adapter_model", "diffusion_pytorch_model", ...
        tensors: By name in the file, in file order (shard by shard, then offset).
        config_text: Text of the config.json beside the weights, or None.
    """

    path: str
    stem: str
    files: tuple[WeightFile, ...]
    tensors: Mapping[str, StoredTensor]
    config_text: str | None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk: a folder, a single file, or a folder of components.

    Attributes:
        root: The folder, or the single file.
        name: Name of the folder or stem of the file, the only trace of the path in an output.
        components: At least one; the root's own first, then by path.
        side_files: Every other file, relative with forward slashes, sorted: what may be copied.
        left_out: Files that are not copied and why ("pytorch_model.bin": "weights in another
            format would be stale").
        warnings: What was odd but harmless, one sentence each.
    """

    root: Path
    name: str
    is_file: bool
    components: tuple[Component, ...]
    side_files: tuple[str, ...]
    left_out: Mapping[str, str]
    warnings: tuple[str, ...]
