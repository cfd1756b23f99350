"""What was found before a run, in a file: whole and as it was written, or not there."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from merge_kit.errors import OutputError

_DIGEST = "blake2b"


def read_found(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a file; None if there is none, or it is not what was written."""
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            digest = (file.metadata() or {}).get(_DIGEST)
    except (OSError, SafetensorError):
        return None
    return found if digest == _digest(found) else None


def write_found(path: Path, found: Mapping[str, Tensor]) -> None:
    """Write tensors to a file, which appears whole or not at all.

    Raises:
        OutputError: If the disk or the system refuses it.
    """
    partial = path.with_suffix(".partial")
    held = {name: tensor.contiguous() for name, tensor in found.items()}
    try:
        save_file(held, partial, {_DIGEST: _digest(held)})
        partial.replace(path)
    except (OSError, SafetensorError) as exc:
        problem = f"cannot write: {getattr(exc, 'strerror', None) or exc}"
        hint = "check the disk and run again: it goes on where it stopped"
        raise OutputError(problem, where=path.name, hint=hint) from exc


def _digest(found: Mapping[str, Tensor]) -> str:
    digest = blake2b(digest_size=16)
    for name in sorted(found):
        tensor = found[name]
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(memoryview(tensor.reshape(-1).view(uint8).numpy().data))
    return digest.hexdigest()
