"""Whether a merge on disk still is what its record says, down to the last bit."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from merge_kit.core.hashing import chunk_bytes, digests, tensor_hash
from merge_kit.core.tensors import StoredTensor
from merge_kit.errors import CheckpointError
from merge_kit.io.header import read_header
from merge_kit.publish.failures import reading
from merge_kit.publish.manifest import Manifest, read_manifest
from merge_kit.publish.references import printable

_THREADS = 2
_CHUNKS = 32
"""Chunks that are read at once: 8 MiB of float32."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found; keys are those of the record.

    Attributes:
        ok: Tensors whose bytes are those that were written.
        differing: Tensors with other bytes.
        missing: Tensors that are not there, or in a file that cannot be read.
        unexpected: Tensors that the record does not know.
        files: What is wrong with files, one line each: missing, of another size, unexpected.
    """

    ok: tuple[str, ...]
    differing: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    files: tuple[str, ...]

    @property
    def is_intact(self) -> bool:
        """Whether everything is as it was written."""
        return not (self.differing or self.missing or self.unexpected or self.files)


def verify(folder: Path) -> Verification:
    """Compare a folder with the record in it, in memory that does not grow with the model.

    Raises:
        CheckpointError: If the record is missing or damaged, or a file cannot be read.
    """
    record = read_manifest(folder)
    problems = list(_file_problems(folder, record))
    found: dict[str, StoredTensor] = {}
    for file in record.files:
        path = folder / file.name
        if _size(path) is None:
            continue
        try:
            tensors = read_header(path).tensors
        except CheckpointError as exc:
            problems.append(f"{file.name}: {exc.problem}")
            continue
        found |= {_key(file.name, tensor.spec.name): tensor for tensor in tensors}
    hashes = _hashes({key: found[key] for key in record.tensors if key in found})
    return Verification(
        ok=tuple(key for key, value in hashes.items() if value == record.tensors[key]),
        differing=tuple(key for key, value in hashes.items() if value != record.tensors[key]),
        missing=tuple(key for key in record.tensors if key not in found),
        unexpected=tuple(key for key in found if key not in record.tensors),
        files=tuple(problems),
    )


def _file_problems(folder: Path, record: Manifest) -> Iterable[str]:
    for file in (*record.files, *record.side_files):
        size = _size(folder / file.name)
        if size is None:
            yield f"{file.name}: missing"
        elif file.nbytes is not None and size != file.nbytes:
            yield f"{file.name}: {size} bytes, expected {file.nbytes}"
    known = {file.name for file in (*record.files, *record.side_files)}
    for path in sorted(folder.rglob("*.safetensors")):
        name = path.relative_to(folder).as_posix()
        if name not in known:
            yield f"{printable(name)}: unexpected"


def _size(path: Path) -> int | None:
    """Return the size of a file, None if there is none."""
    with reading(path):
        return path.stat().st_size if path.is_file() else None


def _key(file: str, tensor: str) -> str:
    """Return a tensor's key: its name behind the folder of its component."""
    component = file.rpartition("/")[0]
    return f"{component}/{tensor}" if component else tensor


def _hashes(tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Return the hash of each tensor, "" for what ends before its time."""
    own = threading.local()

    def hashed(tensor: StoredTensor) -> str:
        if not hasattr(own, "buffer"):
            own.buffer = bytearray()
        return _hash(tensor, own.buffer)

    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            return dict(zip(tensors, pool.map(hashed, tensors.values()), strict=True))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _hash(tensor: StoredTensor, buffer: bytearray) -> str:
    span, dtype = tensor.span, tensor.spec.dtype
    step = _CHUNKS * chunk_bytes(dtype)
    if len(buffer) < min(step, span.nbytes):
        buffer.extend(bytes(min(step, span.nbytes) - len(buffer)))
    joined = []
    with reading(span.path), memoryview(buffer) as memory:
        descriptor = os.open(span.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for start in range(span.start, span.stop, step):
                piece = memory[: min(step, span.stop - start)]
                if not _fill(descriptor, piece, start):
                    return ""
                joined.append(digests(piece, dtype))
        finally:
            os.close(descriptor)
    return tensor_hash(b"".join(joined))


def _fill(descriptor: int, buffer: memoryview, start: int) -> bool:
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], start + done)
        if count == 0:
            return False
        done += count
    return True
