"""The hash of a tensor: xxh3-128 over the digests of its chunks of BLOCK elements.

Chunks have a fixed number of elements, so parts of one tensor can be hashed in parallel and in
slabs of any size.
"""

from __future__ import annotations

import xxhash

from merge_kit.core.tensors import BLOCK, nbytes


def chunk_bytes(dtype: str) -> int:
    """Return the bytes of one chunk of a tensor of this dtype."""
    return nbytes(dtype, BLOCK)


def digests(content: memoryview | bytes, dtype: str) -> bytes:
    """Return the joined 16-byte digests of content that starts at a chunk boundary."""
    view, step = memoryview(content), chunk_bytes(dtype)
    digest = xxhash.xxh3_128_digest
    return b"".join(digest(view[i : i + step]) for i in range(0, len(view), step))


def tensor_hash(joined: bytes) -> str:
    """Return the hash, 32 hex digits, from the joined digests of all chunks in order."""
    return xxhash.xxh3_128_hexdigest(joined)
