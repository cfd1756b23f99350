"""Methods that combine low-rank changes (LoRA) into one: what the planner and the engine ask them.

The change of one module by adapter i is scale_i * b_i @ a_i, a matrix (out, in) that is formed only
where a method needs its elements. A method `works_on`

- "concatenation": the planner lays the factors side by side; nothing is computed but factors.
- "factors": `merge` gets `slab.aux` "a0", "b0", "a1", "b1", ... whole, flat, in float64, with the
  scales folded into b (or into both, see `splits_scales`); `slab.shape` is (out, in);
  `slab.weights` the coefficients of the first adapter that is made, then of the second, ... (uses
  * changes).
- "elements": the planner forms the changes and merges them by `elementwise()`; `merge` gets the
  result, flat, in `slab.tensors[0]`, of shape `slab.shape`, and compresses it.
- "difference": `merge` gets model minus base in `slab.tensors[0]` and compresses it.

Parameters of each model are those of the changes in the slab, in their order (`of_entries`); for
"elements" those of all adapters.

`merge` returns a `Yield` of a (rank, in) and b (out, rank) for each adapter that is made, of the
ranks `slab.ranks`; the scale of what it returns is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from merge_kit.errors import ParameterError
from merge_kit.methods.base import Grain, MergeMethod, PerModel, Scans, Slab

if TYPE_CHECKING:
    from typing import Self


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What a look at one change found.

    Attributes:
        rank: The rank that the parameters ask for, 0 if there is no change.
        norm: Its Frobenius norm, NaN if what it is made of is not finite.
    """

    rank: int
    norm: float


@dataclass(frozen=True, slots=True)
class Work:
    """What the factoring of one change takes.

    Attributes:
        scratch_bytes: On top of the slab and of what it yields in float64.
        flops: Operations of decompositions and products.
    """

    scratch_bytes: int
    flops: float


@dataclass(frozen=True, kw_only=True)
class AdapterMethod(MergeMethod):
    """Base of the methods whose inputs and output are adapters.

    Attributes:
        works_on: See the module.
        additive: Whether an adapter that is named twice counts with the sum of its weights.
        saved: What is done where adapters hold whole tensors (modules_to_save, biases, rows of
            embeddings) and one weight does not decide: error, unless all of them are equal; mean,
            of those that hold it; or first, of the first that holds it.
    """

    makes: ClassVar[Literal["model", "adapter", "structure"]] = "adapter"
    grain: ClassVar[Grain] = "tensor"
    works_on: ClassVar[Literal["concatenation", "factors", "elements", "difference"]] = "factors"
    additive: ClassVar[bool] = True

    saved: Literal["error", "mean", "first"] = "error"

    def coefficients(self, weights: Sequence[float]) -> tuple[float, ...]:
        """Return what the adapters' weights count for, before scales."""
        return tuple(weights)

    def of_entries(self, entries: Sequence[int]) -> Self:
        """Return the method with the parameters of these models alone.

        For a module that some adapters lack, where methods of "factors" are not additive.
        """
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        chosen: dict[str, Any] = {
            name: PerModel(value[i] for i in entries)
            for name, value in values.items()
            if isinstance(value, PerModel)
        }
        return replace(self, **chosen)

    def splits_scales(self) -> bool:
        """Return whether a and b are each multiplied by the root of the scale, not b by all."""
        return False

    def keeps_one(self, rank: int) -> bool:
        """Return whether one change of this rank with coefficient 1 comes out as it went in."""
        del rank
        return False

    def rank_bound(self, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        """Return the rank of the result, or the largest that it can have if `is_fitted()`.

        Args:
            ranks: Of the changes that are combined.
            shape: (out, in).
        """
        raise NotImplementedError

    def is_fitted(self) -> bool:
        """Return whether the rank depends on the weights."""
        return False

    def fit(self, slab: Slab, scans: Scans) -> Sequence[Spectrum]:
        """Return the rank of the result for each adapter that is made; as `merge` in all else."""
        raise NotImplementedError

    def work(self, shape: tuple[int, int], ranks: Sequence[int], made: Sequence[int]) -> Work:
        """Return what `merge` of one module takes; `fit` takes no more.

        Args:
            shape: (out, in).
            ranks: Of the changes that are combined; empty where the slab holds a whole change.
            made: Of the adapters that are made.
        """
        del shape, ranks, made
        return Work(0, 0.0)

    def elementwise(self) -> MergeMethod:
        """Return what merges the changes element by element, for `works_on` "elements"."""
        raise NotImplementedError


def check_truncation(rank: int | None, energy: float | None) -> None:
    """Refuse a rank below 1, a share of energy outside (0, 1], and both at once."""
    if rank is not None and rank < 1:
        raise ParameterError("rank", f"is {rank}, expected at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ParameterError("energy", f"is {energy:g}, expected a number in (0, 1]")
    if rank is not None and energy is not None:
        raise ParameterError("energy", "and rank are both given, expected one of them")
