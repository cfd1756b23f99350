"""One tensor of a header: dtype, shape and offsets, checked against one another."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from merge_kit.core.dtypes import DTYPES
from merge_kit.core.names import nearest
from merge_kit.core.tensors import ByteSpan, StoredTensor, TensorSpec
from merge_kit.errors import CheckpointError
from merge_kit.io.strict_json import shown

_MAX_BITS = 1 << 63
_BITS = {name: dtype.bits for name, dtype in DTYPES.items()}
_KEYS = {"dtype", "shape", "data_offsets"}


def stored_tensor(name: str, entry: Any, data_start: int, path: Path) -> StoredTensor:
    """Return the tensor that one entry of a header describes.

    A header has thousands of entries: what is wrong with one is found out once it is known to be
    wrong.

    Args:
        entry: Whatever JSON value stands under the name.
        data_start: First byte of the tensors in the file.

    Raises:
        CheckpointError: If dtype, shape and offsets are not all there, or do not agree.
    """
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        right = (
            len(entry) == 3
            and type(shape) is list
            and type(start) is int
            and type(stop) is int
            and 0 <= start <= stop
            and _BITS[dtype] * _elements(shape) == 8 * (stop - start)
            and (start < stop or _fits(dtype, shape))
        )
    except (KeyError, TypeError, ValueError):
        right = False
    if not right:
        where = f"{path}, tensor {shown(name)}"
        raise CheckpointError(
            _wrong_entry(entry), where=where, hint="save the file again with a current safetensors"
        )
    span = ByteSpan(path, data_start + start, data_start + stop)
    return StoredTensor(TensorSpec(name, dtype, tuple(shape)), span)


def _elements(shape: Sequence[int]) -> int:
    elements = 1
    for size in shape:
        if type(size) is not int or size < 0:
            raise ValueError(size)
        elements *= size
        if elements > _MAX_BITS:  # also keeps a long shape from growing an integer without end
            raise ValueError(size)
    return elements


def _fits(dtype: str, shape: Sequence[int]) -> bool:
    """Return whether sizes along the way stay below 2^63 bits, zeros not counted."""
    bits = _BITS[dtype]
    for size in shape:
        bits *= max(size, 1)
        if bits >= _MAX_BITS:
            return False
    return True


def _wrong_entry(entry: Any) -> str:
    if not isinstance(entry, dict) or set(entry) != _KEYS:
        found = sorted(entry) if isinstance(entry, dict) else entry
        return f"is described by {shown(found)}, expected dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        hint = nearest(str(dtype)[:20], DTYPES)
        return f"dtype is {shown(dtype)}, expected one of the safetensors format; {hint}"
    if not _sizes(shape):
        return f"shape is {shown(shape)}, expected a list of integers from 0"
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets are {shown(offsets)}, expected two integers, the first not above"
    if not _fits(dtype, shape):
        return f"shape {shown(shape)} overflows: more bytes than any file holds"
    bits, has = _BITS[dtype] * prod(shape), offsets[1] - offsets[0]
    if bits % 8:
        return f"{dtype} of shape {shown(shape)} ends within a byte"
    return f"{dtype} of shape {shown(shape)} needs {bits // 8} bytes, its offsets span {has}"


def _sizes(found: object) -> bool:
    return isinstance(found, list) and all(type(size) is int and size >= 0 for size in found)
