"""What a tensor is in a file: name, dtype, shape, bytes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from merge_kit.core.dtypes import DTYPES

BLOCK = 65_536
"""Elements of a block: element-grain slabs start at its multiples, sums and hashes run over it."""


def numel(shape: tuple[int, ...]) -> int:
    """Return the number of elements, 1 for a 0-d tensor."""
    return prod(shape)


def nbytes(dtype: str, elements: int) -> int:
    """Return the bytes of so many elements, rounded up for packed dtypes."""
    return (DTYPES[dtype].bits * elements + 7) // 8


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype (of the safetensors format) and shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, prod(self.shape))


@dataclass(frozen=True, slots=True)
class ByteSpan:
    """Bytes of one file, `start` included, `stop` not."""

    path: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor and where its bytes are."""

    spec: TensorSpec
    span: ByteSpan
