"""Sources that are made of no others: bytes of files, tensors in memory, numbers from nowhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from merge_kit.core.tensors import ByteSpan, StoredTensor


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes of a file."""

    span: ByteSpan
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """A tensor in memory.

    Attributes:
        tensor: torch's, flat, contiguous, on the CPU; planning does not look into it.
    """

    tensor: Any = field(repr=False)
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Generated:
    """Numbers from no file.

    Attributes:
        kind: zeros; constant, all of them `scale`; or random numbers keyed by `key` and seed:
            normal, of standard deviation `scale`, or uniform, between -scale and scale.
    """

    kind: Literal["zeros", "constant", "normal", "uniform"]
    shape: tuple[int, ...]
    key: str = ""
    seed: int = 0
    scale: float = 1.0

    @property
    def dtype(self) -> str:
        return "F32"


@dataclass(frozen=True, slots=True)
class Found:
    """Numbers that are found before the run, of weights or of prompts.

    Attributes:
        key: Of the artefact that holds them; see `plan.values.Artefact`.
        name: Of the tensor in it.
    """

    key: str
    name: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return "F32"


def of_file(tensor: StoredTensor) -> Stored:
    """Return the bytes of a tensor in a file as a source."""
    return Stored(tensor.span, tensor.spec.dtype, tensor.spec.shape)
