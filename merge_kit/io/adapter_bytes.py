"""The few bytes of an adapter that are looked at before anything is planned."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator

from merge_kit.core.tensors import ByteSpan, StoredTensor
from merge_kit.errors import CheckpointError

_FORMATS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}
_CHUNK_BYTES = 1 << 20


def read_number(tensor: StoredTensor) -> float:
    """Return the one number that a tensor holds.

    Raises:
        CheckpointError: If it holds more, of another kind, or no finite number.
    """
    spec, where = tensor.spec, f"{tensor.span.path}, tensor {tensor.spec.name!r}"
    if spec.numel != 1 or spec.dtype not in {*_FORMATS, "BF16"}:
        problem = f"is {spec.dtype} of shape {list(spec.shape)}, expected one number"
        raise CheckpointError(problem, where=where, hint="save the adapter again")
    raw = b"".join(_read(tensor.span))
    if spec.dtype == "BF16":  # the upper half of a float32
        number = float(struct.unpack("<f", b"\0\0" + raw)[0])
    else:
        number = float(struct.unpack(_FORMATS[spec.dtype], raw)[0])
    if not math.isfinite(number):
        problem = f"is {number}, expected a finite number"
        raise CheckpointError(problem, where=where, hint="the adapter is damaged")
    return number


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two tensors are equal, bit for bit."""
    if (one.spec.dtype, one.spec.shape) != (other.spec.dtype, other.spec.shape):
        return False
    return all(a == b for a, b in zip(_read(one.span), _read(other.span), strict=True))


def _read(span: ByteSpan) -> Iterator[bytes]:
    try:
        descriptor = os.open(span.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for start in range(span.start, span.stop, _CHUNK_BYTES):
                count = min(_CHUNK_BYTES, span.stop - start)
                found = os.pread(descriptor, count, start)
                if len(found) < count:
                    problem = f"ends at byte {start + len(found)}, expected {span.stop}"
                    hint = "was it truncated just now? fetch it again"
                    raise CheckpointError(problem, where=str(span.path), hint=hint)
                yield found
        finally:
            os.close(descriptor)
    except OSError as exc:
        problem = f"cannot read: {exc.strerror}"
        raise CheckpointError(problem, where=str(span.path), hint="check the disk") from exc
