"""Files beside the weights: which may go into an output, and why others may not."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from merge_kit.errors import CheckpointError
from merge_kit.io.families import PICKLED, SAFETENSORS, is_index
from merge_kit.io.folder import Listing, joined
from merge_kit.io.index import few

_FOREIGN = (
    *(".gguf", ".ggml", ".h5", ".hdf5", ".keras", ".msgpack", ".ot", ".pb", ".tflite", ".nemo"),
    *(".onnx", ".onnx_data", ".mlmodel", ".llamafile", ".engine"),
)
_CODE = (".py", ".pyc", ".pyi", ".so", ".sh", ".ipynb")
_RECORDS = ("merge_kit.json", "mergekit_config.yml", "mergekit_config.yaml")
_STATES = ("events.out.tfevents.", "trainer_state.", "optimizer.", "rng_state", "scheduler.")
_CARD = "replaced by the merge's own card"
_RECORD = "a record of an earlier merge"
_INDEX = "rebuilt from the output's own shards"
_UNUSED = "not among the weights that are used"
OF_COURSE = frozenset((_CARD, _RECORD, _INDEX, _UNUSED))
"""Reasons that nobody needs to be told: the output has its own, or a warning says it already."""
_LLAMA_CPP = "convert the original model, or use llama.cpp's converter to get safetensors"


def why_left_out(relative: str) -> str:
    """Return why a file is not copied into an output, or "" if it may be.

    Args:
        relative: Path relative to the checkpoint's root; no weights that are used.
    """
    name = relative.rpartition("/")[2]
    lower = name.lower()
    if relative.lower() == "readme.md":
        return _CARD
    if name in _RECORDS:
        return _RECORD
    if is_index(name):
        return _INDEX
    if lower.endswith(_CODE):
        return "code is not copied"
    if lower.startswith(_STATES) or lower == "training_args.bin":
        return "the state of a training run"
    if lower.endswith((*PICKLED, *_FOREIGN)):
        return "weights in another format would be stale"
    if lower.endswith(SAFETENSORS):
        return _UNUSED
    return ""


def split_side_files(
    listing: Listing, used: Collection[str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the files that may be copied, sorted, and why the others are left out.

    Args:
        used: Weight files that are read, relative to the root.
    """
    side_files, left_out = [], dict(listing.unusable)
    for folder, names in listing.files.items():
        for relative in (joined(folder, name) for name in names):
            why = why_left_out(relative)
            if why and relative not in used:
                left_out.setdefault(relative, why)
            elif relative not in used and relative not in left_out:
                side_files.append(relative)
    return tuple(sorted(side_files)), left_out


def unread_pickles(listing: Listing) -> list[str]:
    """Return pickled weights, relative to the root; states of training runs are none."""
    relative = [joined(f, name) for f, names in listing.files.items() for name in names]
    stale = why_left_out("x.bin")
    return [r for r in relative if r.lower().endswith(PICKLED) and why_left_out(r) == stale]


def no_weights(listing: Listing) -> CheckpointError:
    """Return the error for a folder that holds no safetensors file."""
    where = str(listing.root)
    names = [joined(f, name) for f, names in listing.files.items() for name in names]
    pickles = unread_pickles(listing)
    if pickles:
        return pickled_only(listing.root, pickles)
    foreign = [name for name in names if name.lower().endswith(_FOREIGN)]
    if any(name.lower().endswith(".gguf") for name in foreign):
        return gguf_only(listing.root, few(foreign))
    training = [path for path, why in listing.unusable.items() if "training run" in why]
    if training:
        problem = f"holds no weights of its own, but checkpoints of a training run: {few(training)}"
        return CheckpointError(problem, where=where, hint="name one of them")
    if foreign:
        problem = f"holds weights in other formats only, expected safetensors: {few(foreign)}"
        return CheckpointError(problem, where=where, hint="save the model as safetensors")
    found = f"its {len(names)} files are: {few(names)}" if names else "it is empty"
    problem = f"holds no .safetensors file; {found}"
    return CheckpointError(problem, where=where, hint="is the download complete?")


def pickled_only(path: Path, pickles: Collection[str]) -> CheckpointError:
    """Return the error for pickled weights, which may hold code that runs when they are opened."""
    problem = f"holds pickled weights only ({few(pickles)}); merge_kit never opens pickles"
    hint = f"convert them first: mergekit convert {path} -o OUT"
    return CheckpointError(problem, where=str(path), hint=hint)


def gguf_only(path: Path, found: str) -> CheckpointError:
    """Return the error for GGUF files, whose weights are quantised."""
    problem = f"holds GGUF weights ({found}), expected safetensors"
    return CheckpointError(problem, where=str(path), hint=_LLAMA_CPP)
