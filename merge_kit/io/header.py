"""Headers of safetensors files, read with pread and checked before anything relies on them.

A file is: 8 bytes, the header's length, little endian; the header, a JSON object; the tensors'
bytes, which the header's offsets must cover exactly, without overlap and without a hole.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_kit.core.tensors import StoredTensor
from merge_kit.errors import CheckpointError
from merge_kit.io.header_entry import stored_tensor
from merge_kit.io.strict_json import is_printable, is_unicode, parse_object, shown

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

_FETCH = "is the download complete? fetch the file again"
_CONVERT = "give it the ending .bin and run: mergekit convert"
_OTHER_FORMATS: tuple[tuple[bytes, str, str], ...] = (
    (b"version ", "is a Git LFS pointer, not the file it stands for", "run: git lfs pull"),
    (b"PK\x03\x04", "is a zip archive, probably pickled weights", _CONVERT),
    (b"\x80\x02", "is a pickle", _CONVERT),
    (b"\x80\x04", "is a pickle", _CONVERT),
    (b"GGUF", "is a GGUF file", "convert it to safetensors first"),
    (b"<!", "is a web page", _FETCH),
    (b"<html", "is a web page", _FETCH),
)


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says of itself.

    Attributes:
        tensors: In the order of their bytes.
        metadata: Free text by key.
    """

    tensors: tuple[StoredTensor, ...]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Return the header of a safetensors file, checked against the file's size.

    Raises:
        CheckpointError: If the file cannot be read, is truncated, or breaks the format.
    """
    try:
        # Not blocking: a pipe of this name must be refused, not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        problem = f"cannot open: {exc.strerror}"
        raise CheckpointError(problem, where=str(path), hint="check path and permissions") from exc
    try:
        return _read_header(descriptor, path)
    except OSError as exc:
        problem = f"cannot read the header: {exc.strerror}"
        raise CheckpointError(problem, where=str(path), hint="check the disk") from exc
    finally:
        os.close(descriptor)


def _read_header(descriptor: int, path: Path) -> Header:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(
            "is no regular file, expected a safetensors file",
            where=str(path),
            hint="name a file that ends in .safetensors",
        )
    prefix = os.pread(descriptor, PREFIX_BYTES, 0)
    length = header_length(prefix, status.st_size, path)
    raw = os.pread(descriptor, length, PREFIX_BYTES)
    return parse_header(raw, PREFIX_BYTES + length, status.st_size, path)


def header_length(prefix: bytes, file_nbytes: int, path: Path) -> int:
    """Return the header's length in bytes from the first bytes of a file.

    Raises:
        CheckpointError: If the file is too short to hold such a header, or the header too long.
    """
    if len(prefix) < PREFIX_BYTES:
        problem = f"holds {file_nbytes} bytes, a safetensors file has at least 10"
        raise CheckpointError(problem, where=str(path), hint=_FETCH)
    length = int.from_bytes(prefix, "little")
    if length <= MAX_HEADER_BYTES and PREFIX_BYTES + length <= file_nbytes:
        return length
    for start, problem, hint in _OTHER_FORMATS:
        if prefix.startswith(start):
            raise CheckpointError(f"{problem}, expected safetensors", where=str(path), hint=hint)
    if length > MAX_HEADER_BYTES:
        problem = f"says its header has {length} bytes, at most {MAX_HEADER_BYTES} are allowed"
        raise CheckpointError(problem, where=str(path), hint="is it a safetensors file?")
    problem = f"truncated: expected at least {PREFIX_BYTES + length} bytes, found {file_nbytes}"
    raise CheckpointError(problem, where=str(path), hint=_FETCH)


def parse_header(raw: bytes, data_start: int, file_nbytes: int, path: Path) -> Header:
    """Return the header that `raw`, the JSON text, describes.

    Args:
        data_start: First byte of the tensors in the file.
        file_nbytes: Size of the whole file.
        path: The file, for spans and messages.

    Raises:
        CheckpointError: If it breaks the format or does not fit the file's size.
    """
    where = str(path)
    if not raw.startswith(b"{"):
        problem = f"header starts with {shown(raw[:8])}, expected {{"
        raise CheckpointError(problem, where=where, hint="is it a safetensors file?")
    entries = parse_object(raw, where=where, what="header")
    metadata = _metadata(entries.pop("__metadata__", {}), where)
    names = "".join(entries)
    if not names.isprintable() and not is_printable(names):  # the first is much faster
        _refuse_names(entries, where)
    tensors = [stored_tensor(name, entry, data_start, path) for name, entry in entries.items()]
    tensors.sort(key=_place)
    _check_layout(tensors, data_start, file_nbytes, path)
    return Header(tuple(tensors), metadata)


def _place(tensor: StoredTensor) -> tuple[int, int]:
    return tensor.span.start, tensor.span.stop


def _metadata(found: object, where: str) -> dict[str, str]:
    if not isinstance(found, dict):
        problem = f"__metadata__ is {shown(found)}, expected an object of strings"
        raise CheckpointError(problem, where=where, hint=_FETCH)
    for key, value in found.items():
        if not isinstance(value, str) or not is_unicode(key + value):
            problem = f"__metadata__ has {shown(key)}: {shown(value)}, expected a string"
            raise CheckpointError(problem, where=where, hint="save the file again")
    return found


def _refuse_names(names: Mapping[str, Any], where: str) -> None:
    name = next(name for name in names if not is_printable(name))
    problem = f"tensor name {shown(name)} holds a control character"
    raise CheckpointError(problem, where=where, hint="rename the tensor and save the file again")


def _check_layout(
    tensors: Sequence[StoredTensor], data_start: int, file_nbytes: int, path: Path
) -> None:
    covered, last = data_start, "the header"
    for tensor in tensors:
        span = tensor.span
        if span.start != covered:
            name, gap = shown(tensor.spec.name), span.start - covered
            fault = f"{gap} bytes between" if gap > 0 else f"{-gap} bytes are shared by"
            problem = f"{fault} {last} and tensor {name}, expected none"
            raise CheckpointError(problem, where=str(path), hint="save the file again")
        covered, last = span.stop, f"tensor {shown(tensor.spec.name)}"
    if covered == file_nbytes:
        return
    what = "truncated" if file_nbytes < covered else f"trailing bytes after {last}"
    problem = f"{what}: expected {covered} bytes, found {file_nbytes}"
    raise CheckpointError(problem, where=str(path), hint=_FETCH)
