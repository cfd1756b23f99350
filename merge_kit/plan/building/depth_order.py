"""Which layers of a lower and an upper copy a deeper model takes: whole numbers, nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from merge_kit.errors import ParameterError
from merge_kit.methods.depth_upscale import DepthUpscale


@dataclass(frozen=True, slots=True)
class Order:
    """How many layers are taken.

    Attributes:
        lower: Of the lower copy, from its first.
        pairs: That follow on these in the lower copy, each summed with one of the upper copy, from
            its first.
        upper: Of the upper copy, to its last.
    """

    lower: int
    pairs: int
    upper: int

    @property
    def layers(self) -> int:
        """Layers of the result."""
        return self.lower + self.pairs + self.upper


def overlapping(method: DepthUpscale, below: int, above: int) -> Order:
    """Return how two copies are put on one another.

    Args:
        method: With its target or its overlap.
        below: Layers of the lower copy.
        above: Layers of the upper copy.

    Raises:
        ParameterError: If the result would not be deeper, or there are too few layers for it.
    """
    sums = method.overlap_mode == "sum"
    if method.overlap is None:
        fewer = below + above - _target(method, below, above)
    else:
        fewer = _overlap(method.overlap, below, above, sums=sums) * (1 if sums else 2)
    if sums:
        return Order(below - fewer, fewer, above - fewer)
    return Order(below - fewer // 2, 0, above - (fewer - fewer // 2))


def places_of_copies(method: DepthUpscale, layers: int) -> tuple[int, ...]:
    """Return the layers, ascending, after which block expansion puts a copy of each.

    Raises:
        ParameterError: If there would be no new layer, or more new ones than old ones.
    """
    added = _target(method, layers, layers) - layers
    return tuple((i + 1) * layers // added - 1 for i in range(added))


def _target(method: DepthUpscale, below: int, above: int) -> int:
    """Return the layers that are wanted, more than either copy has and no more than both."""
    assert method.target_layers is not None  # it or the overlap is given
    deepest, most = max(below, above), below + above
    if deepest < method.target_layers <= most:
        return method.target_layers
    has = _has(below, above)
    problem = f"is {method.target_layers}, expected {deepest + 1} to {most}: {has}"
    hint = "layers are added; to take fewer, write slices"
    if method.target_layers > most:
        hint = "upscale the result once more, in a document that names it as its model"
    raise ParameterError("target_layers", problem, hint=hint)


def _overlap(overlap: int, below: int, above: int, *, sums: bool) -> int:
    shallow = min(below, above)
    most = shallow - 1 if sums else (shallow - 1) // 2
    if overlap <= most:
        return overlap
    least = below + above - (overlap if sums else 2 * overlap)
    problem = f"is {overlap}, expected 0 to {most}: {_has(below, above)}, the result has "
    problem += f"{least} and would not be deeper" if least > 0 else "none"
    raise ParameterError("overlap", problem, hint="a smaller overlap makes a deeper model")


def _has(below: int, above: int) -> str:
    plural = "s" if below != 1 else ""
    if below == above:
        return f"the model has {below} layer{plural}"
    return f"the lower model has {below} layer{plural}, the upper {above}"
