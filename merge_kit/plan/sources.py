"""Where any element range of an operand comes from.

A new kind of surgery is a new source, here or in `leaf_sources`, and its reader in
`engine/operands.py`. Every source has `dtype` (of what it yields before conversion) and `shape`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal

from merge_kit.core.dtypes import promoted
from merge_kit.plan.leaf_sources import Found, Generated, Memory, Stored, of_file

if TYPE_CHECKING:
    from merge_kit.plan.values import Step

__all__ = [
    "SOURCES",
    "Chosen",
    "Columns",
    "Concat",
    "Found",
    "Generated",
    "LowRank",
    "Memory",
    "Merged",
    "Normed",
    "Permuted",
    "Projected",
    "Rows",
    "Scaled",
    "Source",
    "Stored",
    "Sum",
    "Transposed",
    "View",
    "elements",
    "of_file",
]


@dataclass(frozen=True, slots=True)
class LowRank:
    """weight + scale * b @ a, with a (rank, columns) and b (rows, rank); weight None is zero."""

    weight: Source | None
    a: Source
    b: Source
    scale: float
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.weight.dtype if self.weight is not None else "F32"


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a matrix (or elements of a vector) in another order; -1 is a row of zeros."""

    source: Source
    rows: Sequence[int]

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.source.shape[1:])


@dataclass(frozen=True, slots=True)
class Concat:
    """Sources of equal trailing shape, one after the other along the first axis."""

    sources: tuple[Source, ...]

    @property
    def dtype(self) -> str:
        return promoted([source.dtype for source in self.sources])

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.sources[0].shape
        return (sum(source.shape[0] for source in self.sources), *first[1:])


@dataclass(frozen=True, slots=True)
class View:
    """A run of elements of a flattened source, from `start`, in another shape."""

    source: Source
    start: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.source.dtype


@dataclass(frozen=True, slots=True)
class Permuted:
    """A matrix with its rows and columns in another order; None leaves an axis alone."""

    source: Source
    rows: tuple[int, ...] | None
    columns: tuple[int, ...] | None

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape


@dataclass(frozen=True, slots=True)
class Projected:
    """left @ matrix @ right, either factor None for the identity."""

    source: Source
    left: Source | None
    right: Source | None

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.source.shape
        rows = rows if self.left is None else self.left.shape[0]
        return (rows, columns if self.right is None else self.right.shape[1])


@dataclass(frozen=True, slots=True)
class Scaled:
    """A matrix, each of its columns times a number of a vector."""

    source: Source
    factors: Source

    @property
    def dtype(self) -> str:
        return promoted([self.source.dtype, self.factors.dtype])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape


@dataclass(frozen=True, slots=True)
class Sum:
    """The sum of sources of equal shape, each times a factor, added in this order."""

    terms: tuple[tuple[float, Source], ...]

    @property
    def dtype(self) -> str:
        dtypes = [source.dtype for _, source in self.terms]
        return dtypes[0] if len(dtypes) == 1 else promoted([*dtypes, "F32"])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.terms[0][1].shape


@dataclass(frozen=True, slots=True)
class Columns:
    """Matrices of equal height, side by side."""

    sources: tuple[Source, ...]

    @property
    def dtype(self) -> str:
        return promoted([source.dtype for source in self.sources])

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.sources[0].shape[0], sum(source.shape[1] for source in self.sources))


@dataclass(frozen=True, slots=True)
class Transposed:
    """A matrix, its rows as columns. It is held whole while it is read: meant for factors."""

    source: Source

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.source.shape
        return (columns, rows)


@dataclass(frozen=True, slots=True)
class Normed:
    """magnitude / |v| * v for each output's vector v of a tensor, as DoRA has it.

    Attributes:
        magnitude: One number an output; its shape may have axes of one element more.
        axis: 0 where the outputs are the first axis, and the vector the rest of the tensor; 1
            where they are the columns of a matrix, which is then held whole while it is read.
    """

    source: Source
    magnitude: Source
    axis: Literal[0, 1] = 0

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape


@dataclass(frozen=True, slots=True)
class Chosen:
    """One of several sources of equal shape and dtype: which one is found before the run.

    Attributes:
        key: Of the artefact.
        name: Of a vector of whole numbers in it.
        place: Where the vector holds the number of the source.
        plain: Whether all sources are runs of bytes of files, or views of one source, so that one
            tells what reading any of them takes: a plan may hold as many choices as there are
            experts, each among all.
    """

    sources: tuple[Source, ...]
    key: str
    name: str
    place: int
    plain: bool = False

    @property
    def dtype(self) -> str:
        return self.sources[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sources[0].shape


@dataclass(frozen=True, slots=True)
class Merged:
    """What a step of another stage yields: recomputed slab by slab, or spilled to scratch.

    Attributes:
        dtype: What the stage's result is rounded to ("BF16" if the stage names it), else F32.
        spill: Byte offset in the scratch file, or None if it is recomputed.
    """

    step: Step
    dtype: str
    shape: tuple[int, ...]
    spill: int | None = None


Source = (
    Stored
    | Memory
    | LowRank
    | Rows
    | Concat
    | View
    | Permuted
    | Projected
    | Scaled
    | Sum
    | Columns
    | Transposed
    | Normed
    | Generated
    | Found
    | Chosen
    | Merged
)


SOURCES = Source.__args__
"""The classes of sources."""


def elements(source: Source) -> int:
    """Return the number of elements that a source yields."""
    return prod(source.shape)
