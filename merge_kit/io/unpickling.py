"""Tensors out of pickled files, with torch's restricted unpickler. Runs in the child only."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from merge_kit.core.dtypes import DTYPES
from merge_kit.core.tensors import TensorSpec
from merge_kit.errors import CheckpointError
from merge_kit.io.index import Index, check_once, check_tensors
from merge_kit.io.strict_json import is_printable, shown

# Before 2.6 the restricted unpickler could be made to run code (CVE-2025-32434).
_SAFE_TORCH = (2, 6)
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params_ema", "params")
_ADVICE = ("Weights only load failed", "Please file", "Check the documentation", "(1)", "(2)")
_DTYPE_NAMES = {
    getattr(torch, dtype.torch_name): dtype.name
    for dtype in DTYPES.values()
    if dtype.bits >= 8 and hasattr(torch, dtype.torch_name)
}


@dataclass(frozen=True, slots=True)
class Part:
    """Pickled files whose tensors make one set of weights; see `pickled.PickledPart`."""

    stem: str
    files: tuple[Path, ...]
    weight_map: Mapping[str, str]
    tied: bool


@dataclass(frozen=True, slots=True)
class Loaded:
    """The tensors of one file, in its order, and what it held beside them."""

    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """What is to be written, in the order of the files."""

    specs: tuple[TensorSpec, ...]
    notes: tuple[str, ...]


def survey(part: Part) -> Survey:
    """Return what the files hold, loading one at a time.

    Raises:
        CheckpointError: If a file is refused, or files contradict one another or the index.
    """
    specs: list[TensorSpec] = []
    notes: list[str] = []
    held: dict[str, list[str]] = {}
    for file in part.files:
        loaded = load_tensors(file)
        held[file.name] = list(loaded.tensors)
        heads = _tied_heads(loaded.tensors) if part.tied else set()
        notes.extend(loaded.notes)
        notes.extend(f"{head} is the embedding and was left out" for head in sorted(heads))
        specs.extend(
            _spec(name, tensor, file)
            for name, tensor in loaded.tensors.items()
            if name not in heads
        )
    folder = part.files[0].parent
    check_once(held, where=str(folder))
    if part.weight_map:
        check_tensors(Index(folder, part.weight_map, None), held)
    if not specs:
        raise CheckpointError("holds no tensors", where=str(folder), hint="is it the right file?")
    return Survey(tuple(specs), tuple(notes))


def load_tensors(file: Path) -> Loaded:
    """Return the tensors of a pickled file, mapped into memory where its format allows.

    Raises:
        CheckpointError: If the unpickler refuses the file, or it holds no mapping of tensors.
    """
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < _SAFE_TORCH:
        problem = f"torch {torch.__version__} cannot open pickles safely, expected 2.6 or later"
        raise CheckpointError(problem, where=str(file), hint="install a newer torch")
    try:
        is_zip = zipfile.is_zipfile(file)
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as exc:  # whatever a damaged or hostile file makes of the unpickler
        raise CheckpointError(f"refused to open: {_reason(exc)}", where=str(file)) from exc
    return _unwrapped(found, file)


def _reason(exc: Exception) -> str:
    """Return what the unpickler complains of, without its advice to trust the file."""
    text = str(exc)
    if not isinstance(exc, UnpicklingError):
        text = f"{type(exc).__name__}: {text}"
    lines = [line.strip() for line in text.splitlines()]
    reasons = [line for line in lines if line and not line.startswith(_ADVICE)]
    reason = " ".join(reasons).removeprefix("WeightsUnpickler error: ")
    return re.split(r"\. (?=[A-Z])", reason)[0][:300]


def _unwrapped(found: object, file: Path) -> Loaded:
    """Return the tensors of a state dict, or of the one that a training checkpoint wraps."""
    notes: list[str] = []
    wrapper = next((key for key in _WRAPPERS if _wraps(found, key)), None)
    if isinstance(found, dict) and wrapper is not None:
        others = [shown(key) for key in found if key != wrapper]
        if others:
            notes.append(f"{file.name}: kept {wrapper!r}, left out {', '.join(others[:10])}")
        found = found[wrapper]
    if not isinstance(found, dict):
        problem = f"holds a {type(found).__name__}, expected a mapping of names to tensors"
        raise CheckpointError(problem, where=str(file))
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            problem = f"holds {shown(name)}, a {type(tensor).__name__}, expected tensors only"
            raise CheckpointError(problem, where=str(file))
    return Loaded({name: tensor.detach() for name, tensor in found.items()}, tuple(notes))


def _wraps(found: object, key: str) -> bool:
    return isinstance(found, dict) and isinstance(found.get(key), dict)


def _spec(name: str, tensor: Tensor, file: Path) -> TensorSpec:
    where = f"{file}, tensor {shown(name)}"
    if not is_printable(name) or name == "__metadata__":
        raise CheckpointError("has a name that safetensors files do not allow", where=where)
    if tensor.layout is not torch.strided or tensor.dtype not in _DTYPE_NAMES:
        problem = f"is {tensor.layout} of {tensor.dtype}, which safetensors files do not hold"
        raise CheckpointError(problem, where=where, hint="make it dense and save the file again")
    if tensor.device.type != "cpu":
        raise CheckpointError("has no bytes, only a shape", where=where)
    return TensorSpec(name, _DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def _tied_heads(tensors: Mapping[str, Tensor]) -> set[str]:
    """Return output heads that are the very memory of another tensor."""
    others = {_view(t) for name, t in tensors.items() if not name.endswith("lm_head.weight")}
    heads = {name for name in tensors if name.endswith("lm_head.weight")}
    return {head for head in heads if tensors[head].numel() and _view(tensors[head]) in others}


def _view(tensor: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]:
    if tensor.layout is not torch.strided:
        return (id(tensor), (), (), tensor.dtype)
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the elements of a tensor in row-major order, whatever its strides."""
    plain = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data if plain.numel() else memoryview(b"")
