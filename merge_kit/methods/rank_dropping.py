"""Random pruning of task vectors by rank: the larger a change, the more probably it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from merge_kit.core.tensors import BLOCK
from merge_kit.errors import ParameterError
from merge_kit.methods import noise
from merge_kit.methods.dropping import check_densities
from merge_kit.methods.lazy import np, torch
from merge_kit.methods.ranks import ascending

if TYPE_CHECKING:
    from torch import Tensor

    from merge_kit.methods.base import Grain, Slab

Variant = Literal["mergekit", "paper"]


def check_windows(densities: Sequence[float], epsilons: Sequence[float], variant: Variant) -> None:
    """Check the shares that are kept of the models, and how far the probabilities spread.

    Raises:
        ParameterError: If a probability is not above 0 and below 1, but where a density of 0 or 1
            leaves nothing to chance.
    """
    check_densities(densities)
    for density, epsilon in zip(densities, epsilons, strict=True):
        if not epsilon >= 0:
            raise ParameterError("epsilon", f"is {epsilon:g}, expected a number of at least 0")
        reach = epsilon / 2 if variant == "paper" else epsilon
        if 0 < density < 1 and not (density - reach > 0 and density + reach < 1):
            raise ParameterError(
                "epsilon",
                f"is {epsilon:g}, and the probabilities of keeping an element would go from "
                f"{density - reach:g} to {density + reach:g}, expected them between 0 and 1",
                hint=f"with density {density:g}, epsilon must stay below "
                f"{min(density, 1 - density) * epsilon / reach:g}",
            )


def chances(density: float, epsilon: float, columns: int, variant: Variant) -> Any:
    """Return the probabilities of keeping the elements of a row, from the smallest magnitude.

    Args:
        density: About their mean, above 0 and below 1.
        epsilon: Half of their spread, or with the paper's variant all of it.
        columns: Elements of the row, at least 1; one alone has the probability `density`.

    Returns:
        (columns,), numpy float64.
    """
    if columns == 1:
        return np.array([density])
    ranks = np.arange(columns, dtype=np.float64)
    if variant == "paper":
        return density + epsilon / 2 - epsilon / columns * (columns - 1 - ranks)
    return density - epsilon + 2 * epsilon / (columns - 1) * ranks


def drop_by_rank(
    row: Tensor, probabilities: Any, key: noise.Key, offset: int, *, rescale: bool
) -> Tensor:
    """Keep each element with the probability of its rank, in place, the others become zero.

    The draws of a row go to its elements in the order of their magnitudes.

    Args:
        row: (elements,), whole rows of the tensor one after the other.
        probabilities: (columns,), from the smallest magnitude of a row to its largest.
        key: Names the random numbers.
        offset: Index of the first element in the flattened tensor.
        rescale: Whether to divide what is kept by its exact probability.
    """
    columns = len(probabilities)
    below, bits = noise.thresholds(probabilities)
    factors = 2.0**bits / below.astype(np.float64) if rescale else np.ones(columns)
    factors = factors.astype(row.numpy().dtype)
    step = max(1, BLOCK // columns) * columns
    for start in range(0, row.numel(), step):
        part = row[start : start + step].view(-1, columns)
        at = offset + start
        drawn = noise.draws(key, at, at + part.numel(), bits).reshape(part.shape)
        by_rank = torch.from_numpy((drawn < below) * factors)
        part.mul_(torch.empty_like(part).scatter_(1, ascending(part), by_rank))
    return row


def drop_slab(
    slab: Slab,
    densities: Sequence[float],
    epsilons: Sequence[float],
    variant: Variant,
    *,
    rescale: bool,
) -> None:
    """Drop elements of each model of a slab by rank, in place; density 1 drops none, 0 all."""
    for i, (row, density, epsilon) in enumerate(zip(slab.deltas, densities, epsilons, strict=True)):
        if density in {0, 1} or not row.numel():
            row.mul_(density)
            continue
        probabilities = chances(density, epsilon, slab.columns, variant)
        key = (slab.seed, "della", i, slab.name)
        drop_by_rank(row, probabilities, key, slab.offset, rescale=rescale)


def residency(densities: Sequence[float]) -> Grain:
    """Return "row", or "element" where every density is 0 or 1 and leaves nothing to chance."""
    return "row" if any(0 < density < 1 for density in densities) else "element"


def scratch_bytes(elements: int) -> int:
    """Return the bytes that `drop_slab` takes for a slab of so many elements, if it is one row."""
    return 80 * elements
