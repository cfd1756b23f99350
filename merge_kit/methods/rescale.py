"""Weighted averages of models that are brought to one scale first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import TYPE_CHECKING, ClassVar, Literal

from merge_kit.errors import ParameterError
from merge_kit.methods import mixing
from merge_kit.methods.base import Law, MergeMethod, PerModel, Scan, Scans, Slab, per_model
from merge_kit.methods.registry import register
from merge_kit.methods.spreads import Spread, Spreads

if TYPE_CHECKING:
    from torch import Tensor

_SHORTEST = 1e-150  # what is smaller has lost its digits to the squares


@register("rescale")
@dataclass(frozen=True, kw_only=True)
class Rescale(MergeMethod):
    """Average models after each is brought to one scale, a tensor at a time.

    out = sum(w_i s_i x_i) / sum(w_i), s_i = r / size(x_i), or without the division if normalize
    is false; r is the size of the reference

    A model whose training let a tensor grow would outweigh the others in a plain average; here it
    counts as its weight says. Tensors are only multiplied, also by the standard deviation: no
    mean is moved. What has no size stays as it is (s_i = 1): zero tensors, and by the standard
    deviation those whose elements are all equal, such as one element. Where the reference has
    none, all models stay as they are.

    A base is never one of the models that are averaged, whatever `to` says. Weights may be
    negative. Weights whose sum is zero (within 1e-6 of the sum of their magnitudes) cannot be
    normalised and are an error.

    Attributes:
        weight: Weight of each model, any finite number.
        normalize: Whether to divide by the sum of the weights.
        by: What size is: norm (the root of the sum of squares), or std (the standard deviation).
        to: The reference: mean (the mean of the sizes of the models that have one), or base (the
            base; without one, the first model).

    Cost: two passes.
    Source: none; the plain average that it starts from is Wortsman et al. 2022, Model soups,
        https://arxiv.org/abs/2203.05482
    """

    takes_base: ClassVar[bool] = True
    error_factor: ClassVar[float] = 2.0  # the factors round too
    laws: ClassVar[Mapping[Law, float]] = {
        "single": 0.0,
        "copies": 2.0**-22,
        "copies_of_base": 2.0**-22,
        "permute_models": 2.0**-20,
        "permute_rows": 2.0**-20,
    }

    weight: PerModel[float] = per_model(1.0)
    normalize: bool = True
    by: Literal["norm", "std"] = "norm"
    to: Literal["base", "mean"] = "mean"

    def __post_init__(self) -> None:
        if self.by not in ("norm", "std"):
            raise ParameterError("by", f"is {self.by!r}, expected norm or std")
        if self.to not in ("base", "mean"):
            raise ParameterError("to", f"is {self.to!r}, expected base or mean")
        if self.normalize and self.weight:
            mixing.shares(self.weight, "normalize")

    def scans(self) -> Sequence[Scan]:
        """Return the sizes of the models, and of a base before them."""
        return [Scan("spreads", Spreads(), of=_with_base)]

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the average; overwrites the models."""
        weights: Sequence[float] = self.weight or [1.0] * len(slab.tensors)
        if self.normalize:
            weights = mixing.shares(weights, "normalize")
        sizes = [self._size(spread) for spread in scans["spreads"]]
        models = sizes if slab.base is None else sizes[1:]
        reference = sizes[0] if self.to == "base" else _mean([size for size in models if size > 0])
        factors = [_ratio(reference, size) for size in models]
        return mixing.weighted_sum(
            slab.tensors, [w * f for w, f in zip(weights, factors, strict=True)]
        )

    def _size(self, spread: Spread) -> float:
        """Return the size, 0.0 for none, NaN if elements are not finite."""
        size = spread.norm if self.by == "norm" else spread.std
        return 0.0 if size <= _SHORTEST else size


def _with_base(slab: Slab, scans: Scans) -> list[Tensor]:
    del scans
    return [*([] if slab.base is None else [slab.base]), *slab.tensors]


def _mean(sizes: Sequence[float]) -> float:
    return fsum(sizes) / len(sizes) if sizes else 0.0


def _ratio(reference: float, size: float) -> float:
    return reference / size if reference and size > 0 else 1.0
