"""Random pruning of task vectors: each element is kept with some probability.

What is kept is divided by that probability, so that the expected value is what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from merge_kit.core.tensors import BLOCK
from merge_kit.errors import ParameterError
from merge_kit.methods import noise
from merge_kit.methods.base import PerModel
from merge_kit.methods.lazy import np

if TYPE_CHECKING:
    from torch import Tensor

    from merge_kit.methods.base import MergeMethod, Slab


RUN = 2 * BLOCK
"""Elements that are dropped at once: they stay in the cache."""


def fill(method: MergeMethod, models: int) -> None:
    """Give each model the default of what a new method was not told, as the planner does."""
    for entry in fields(method):
        if "default" in entry.metadata and not getattr(method, entry.name):
            value = PerModel([entry.metadata["default"]] * models)
            object.__setattr__(method, entry.name, value)


def check_densities(densities: Sequence[float]) -> None:
    """Check the shares that are kept of the models.

    Raises:
        ParameterError: If one is no number in [0, 1].
    """
    for density in densities:
        if not 0 <= density <= 1:
            raise ParameterError(
                "density",
                f"is {density:g}, expected a number in [0, 1]",
                hint="density is the share that is kept, not a percentage",
            )


def drop(
    row: Tensor, density: float, key: noise.Key, offset: int, *, rescale: bool = True
) -> Tensor:
    """Keep each element of a row with probability `density`, in place, the others become zero.

    Args:
        row: (elements,).
        density: In [0, 1]; 0 keeps nothing, 1 everything.
        key: Names the random numbers.
        offset: Index of the first element in the flattened tensor.
        rescale: Whether to divide what is kept by its exact probability.
    """
    if density == 1:
        return row
    stretch = 1 / noise.probability(density) if rescale and density else 1.0
    values = row.numpy()
    with np.errstate(invalid="ignore"):  # infinity: the engine looks for it in the result
        for start in range(0, len(values), RUN):
            part = values[start : start + RUN]
            at = offset + start
            np.multiply(part, noise.kept(key, density, at, at + len(part)), out=part)
            if stretch != 1.0:
                row[start : start + RUN].mul_(stretch)
    return row


def drop_all(slab: Slab, densities: Sequence[float], *, rescale: bool) -> Slab:
    """Drop elements of each model of a slab at random, in place, and return the slab."""
    for i, (row, density) in enumerate(zip(slab.deltas, densities, strict=True)):
        drop(row, density, (slab.seed, "dare", i, slab.name), slab.offset, rescale=rescale)
    return slab
