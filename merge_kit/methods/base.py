"""What a merge method is: parameters, demands, scans, and pure arithmetic on one slab."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from merge_kit.methods.reductions import Reduction

if TYPE_CHECKING:
    from torch import Tensor

    from merge_kit.methods.reductions import Rows

Grain = Literal["element", "row", "tensor"]
Scans = Mapping[str, Any]
T = TypeVar("T")


class PerModel(tuple[T, ...]):
    """Values of a parameter that each model may set for itself, in the order of the models."""

    __slots__ = ()


def per_model(default: float | bool | None) -> Any:
    """Return a dataclass field for a `PerModel` parameter that has a default for each model."""
    return field(default_factory=PerModel, metadata={"default": default})


@dataclass(frozen=True, slots=True)
class Slab:
    """A run of elements of one output tensor, from every model.

    The method may overwrite `tensors` and `aux`; they are scratch. `base` it may not.

    Attributes:
        tensors: (models, elements), float32 or float64; models minus base if the method operates
            on deltas. Rows are contiguous; take `tensors[i]`, never reduce over the models axis.
        base: (elements,), or None if the method takes no base.
        weights: One a model, the method's `weight` parameter, or ones.
        name: Name of the output tensor.
        shape: Full shape of the output tensor, whatever the slab holds.
        models: Keys of the models, stable between runs and machines.
        offset: Index of the first element in the flattened tensor.
        seed: Seed of the run.
        aux: Further operands by name (importances and the like), (elements,) each; those whose
            shape is not the tensor's are there whole, flat.
        ranks: Of a step that yields factors, the rank of each adapter that is made, else empty.
        stored_dtype: Dtype that the result is rounded to, as in a header.
    """

    tensors: Tensor
    base: Tensor | None
    weights: tuple[float, ...]
    name: str
    shape: tuple[int, ...]
    models: tuple[str, ...]
    offset: int
    seed: int
    aux: Mapping[str, Tensor]
    ranks: tuple[int, ...] = ()
    stored_dtype: str = "F32"

    @property
    def deltas(self) -> Tensor:
        """`tensors`, for methods that operate on deltas."""
        return self.tensors

    @property
    def columns(self) -> int:
        """Elements of one row (the last axis); 1 for 0-d tensors, all for 1-d ones."""
        return self.shape[-1] if self.shape else 1


@dataclass(frozen=True, slots=True)
class Yield:
    """What a step yields, with what is worth knowing about it.

    Attributes:
        tensors: One an output of the step, in their order, flat or in shape.
        facts: For each adapter that is made, numbers by name: "norm" is the Frobenius norm of the
            change that was asked for, "residual" that of what the factors miss of it, as they are
            rounded to `Slab.stored_dtype`.
    """

    tensors: Sequence[Tensor]
    facts: Sequence[Mapping[str, float]] = ()


@dataclass(frozen=True, slots=True)
class Scan:
    """One statistic that must be known before `merge` runs.

    Attributes:
        reduction: How it is gathered.
        of: What is scanned of a slab, k rows of elements; default: `slab.tensors`. It may read the
            results of the scans named in `uses`, and must not overwrite the slab.
        uses: Earlier scans that `of` reads; scans that use nothing share one pass.
        scope: "tensor", or "model": over all tensors that the stage merges by this method.
    """

    name: str
    reduction: Reduction
    of: Callable[[Slab, Scans], Rows] | None = None
    uses: tuple[str, ...] = ()
    scope: Literal["tensor", "model"] = "tensor"


Law = Literal["single", "copies", "copies_of_base", "permute_models", "permute_rows"]
"""Properties that a method may claim, each held by the law tests.

single: one model with neutral parameters gives that model.
copies: copies of one model (base included) give that model.
copies_of_base: models equal to the base give the base.
permute_models: the order of models (with their parameters) changes nothing.
permute_rows: permuting the rows of all inputs permutes the rows of the result.
"""


@dataclass(frozen=True)
class MergeMethod:
    """Base of all methods: a frozen dataclass whose fields are the recipe's parameters.

    Fields named with a trailing underscore are recipe keys that Python reserves (`lambda_`).

    Attributes:
        needs_base: A base is required and is no ordinary input.
        takes_base: A base, if there is one, is no ordinary input.
        operates_on: Whether slabs hold models, or models minus base.
        min_inputs: Fewest models, the base not counted if it is no ordinary input.
        max_inputs: Most models, None for any number.
        grain: What must be resident: elements, whole rows, or whole tensors.
        outputs: Tensors that one step writes; above 1, `merge` returns a sequence.
        statistics_of: What the files hold that the parameter `statistics` names for each model,
            and `aux` in turn: "elements", a number an element; "inputs", a matrix (inputs,
            inputs) for weights, and none for other tensors; "" if there is no such parameter.
        laws: Claims and their relative tolerance, 0.0 for bit equality.
        checks_inputs: Whether NaN and infinity can vanish in the arithmetic, and so are looked for
            before it; in whole tensors they always are.
        by_name: Whether numbers may depend on the tensor's name, as masks and the order of equals
            do; so it is unless a method says otherwise.
        makes: "model"; "adapter": see `methods.updates`; or "structure": see `methods.structures`.
        error_factor: Factor on the measure 2^-22 * sum |w_i x_i| of rounding.
    """

    needs_base: ClassVar[bool] = False
    takes_base: ClassVar[bool] = False
    operates_on: ClassVar[Literal["tensors", "deltas"]] = "tensors"
    min_inputs: ClassVar[int] = 1
    max_inputs: ClassVar[int | None] = None
    grain: ClassVar[Grain] = "element"
    outputs: ClassVar[int] = 1
    statistics_of: ClassVar[Literal["", "elements", "inputs"]] = ""
    laws: ClassVar[Mapping[Law, float]] = {}
    checks_inputs: ClassVar[bool] = False
    by_name: ClassVar[bool] = True
    makes: ClassVar[Literal["model", "adapter", "structure"]] = "model"
    error_factor: ClassVar[float] = 1.0
    method_name: ClassVar[str] = ""

    def residency(self) -> Grain:
        """Return the grain under these parameters."""
        return self.grain

    def copies(self) -> bool:
        """Return whether the result is the one input, byte for byte."""
        return False

    def scans(self) -> Sequence[Scan]:
        """Return the statistics that `merge` needs, in an order in which each may use earlier."""
        return ()

    def scratch_bytes(self, models: int, elements: int) -> int:
        """Return bytes that `merge` takes on top of its slab, for the plan's bill.

        Args:
            models: Models in the slab, the base not counted.
            elements: Elements of the slab, and of the largest operand that is there whole.
        """
        del models
        return 4 * elements

    def flops(self, name: str, shape: tuple[int, ...], models: int) -> float:
        """Return the operations of solves and decompositions, 0 where reading is what takes time.

        Args:
            name: Name of the output tensor.
            shape: Its shape.
            models: Models, the base not counted.
        """
        del name, shape, models
        return 0.0

    def merge(self, slab: Slab, scans: Scans) -> Tensor | Sequence[Tensor] | Yield:
        """Return the merged slab, (elements,), of the dtype of the slab."""
        raise NotImplementedError
