"""The pieces of a sentencepiece model, read from its protocol buffer bytes."""

from __future__ import annotations

from collections.abc import Iterator

from merge_kit.errors import CheckpointError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_PIECES = 1
_TEXT = 1


class _TruncatedError(ValueError):
    pass


def pieces(name: str, content: bytes) -> list[str]:
    """Return the pieces of a model in the order of their ids.

    Raises:
        CheckpointError: If the bytes are no such model.
    """
    try:
        found = [_piece(value) for field, value in _fields(content) if field == _PIECES]
    except ValueError as exc:
        problem = f"no sentencepiece model: {exc}"
        raise CheckpointError(problem, where=name, hint="is the download complete?") from exc
    if not found:
        problem = "no sentencepiece model: it holds no pieces"
        raise CheckpointError(problem, where=name, hint="is the download complete?")
    return found


def _piece(message: bytes) -> str:
    texts = [value for field, value in _fields(message) if field == _TEXT]
    return texts[-1].decode() if texts else ""


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of the fields that hold bytes; the others are skipped."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind, nbytes = tag & 7, 0
        if kind == _VARINT:
            at = _varint(message, at)[1]
            continue
        if kind == _BYTES:
            nbytes, at = _varint(message, at)
        elif kind in (_FIXED64, _FIXED32):
            nbytes = 8 if kind == _FIXED64 else 4
        else:
            raise _TruncatedError(f"unknown wire type {kind}")
        if at + nbytes > len(message):
            raise _TruncatedError("it ends within a field")
        if kind == _BYTES:
            yield tag >> 3, message[at : at + nbytes]
        at += nbytes


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise _TruncatedError("it ends within a number")
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
    raise _TruncatedError("a number has too many bytes")
