"""What methods share that weigh models by statistics: shares of the models, checked operands."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

from merge_kit.errors import CheckpointError, ParameterError
from merge_kit.methods.base import Slab

if TYPE_CHECKING:
    from torch import Tensor

ALONG_ROWS, ALONG_COLUMNS = "statistics", "statistics of columns"
"""What an operand's name starts with; the second: the tensor's first axis is the input's."""

COLLECT_AGAIN = "collect the statistics again, with scripts/collect_statistics.py"


def operand_name(model: int, *, of_columns: bool = False) -> str:
    """Return the name among a slab's further operands of one model's statistics."""
    return f"{ALONG_COLUMNS if of_columns else ALONG_ROWS} {model}"


def of_model(slab: Slab, model: int) -> Tensor | None:
    """Return the statistics of one model that lie along rows, or None."""
    return slab.aux.get(operand_name(model))


def check_weights(weights: Sequence[float]) -> None:
    """Check weights of evidence.

    Raises:
        ParameterError: If one is negative, or all are zero.
    """
    for weight in weights:
        if not weight >= 0:
            problem = f"is {weight:g}, expected a number from 0"
            hint = "a model's evidence counts for it or not at all"
            raise ParameterError("weight", problem, hint=hint)
    if weights and not any(weights):
        hint = "give at least one model a weight above 0"
        raise ParameterError("weight", "is 0 for every model", hint=hint)


def shares(weights: Sequence[float]) -> list[float]:
    """Return weights divided by their sum, which does not overflow."""
    largest = max(weights)
    total = sum(weight / largest for weight in weights)
    return [weight / largest / total for weight in weights]


def check_range(values: Tensor, slab: Slab, model: int, *, least: float = -inf) -> Tensor:
    """Return statistics, checked to be finite, and not below `least`.

    Raises:
        CheckpointError: If they are not; it names model and tensor.
    """
    if not values.numel():
        return values
    low, high = (float(bound) for bound in values.aminmax())
    if low >= least and -inf < low and high < inf:  # NaN is no bound
        return values
    found = f"hold {low:g}" if low < least else "hold NaN or infinite values"
    wanted = "no negative number" if least == 0 else "finite numbers"
    raise CheckpointError(
        f"the statistics of {slab.models[model]} {found}, expected {wanted}",
        where=slab.name,
        hint=COLLECT_AGAIN,
    )


def check_symmetric(gram: Tensor, slab: Slab, model: int) -> None:
    """Check that a Gram matrix is one.

    Raises:
        CheckpointError: If it is not symmetric, within 1e-3 of its largest element.
    """
    apart = float((gram - gram.T).abs_().max()) if gram.numel() else 0.0
    if apart > 1e-3 * float(gram.diagonal().max() if gram.numel() else 0):
        raise CheckpointError(
            f"the statistics of {slab.models[model]} are no Gram matrix: they are not symmetric",
            where=slab.name,
            hint=COLLECT_AGAIN,
        )
