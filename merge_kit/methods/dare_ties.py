"""Random pruning of task vectors, then a vote on signs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from merge_kit.errors import ParameterError
from merge_kit.methods import dropping
from merge_kit.methods.base import Law, MergeMethod, PerModel, Scan, Scans, Slab, per_model
from merge_kit.methods.registry import register
from merge_kit.methods.ties import Ties

if TYPE_CHECKING:
    from torch import Tensor

    from merge_kit.methods.reductions import Rows


@register("dare_ties")
@dataclass(frozen=True, kw_only=True)
class DareTies(MergeMethod):
    """Drop elements of task vectors at random, rescale the others, and vote on signs (DARE, TIES).

    e_i = m_i (x_i - base) / p_i; m_i = 1 with probability p_i, else 0
    s = sign(sum(w_i e_i)); A = the models whose w_i e_i has the sign s
    out = base + lambda * sum over A of w_i e_i,
          divided by sum over A of |w_i| if normalize is true

    Each element is drawn by itself. p_i is `density` rounded to a multiple of 2^-16 (2^-32 within
    2^-8 of 0 or 1), and what is kept is divided by exactly that: the expected value of e_i is the
    task vector. Which elements are kept depends on the run's seed, the position of the model among
    the models (the base not counted), the name of the tensor, and the element. Density 0 keeps
    nothing, 1 everything. dare_linear keeps the same elements. A sum of zero counts as plus; an
    element that nobody keeps stays the base's.

    Scope: each element by itself; with `variant: paper` the whole model. Vote: by weight and size.
    Normalisation: by the weights of the models that agree, element by element, off.

    Differences: mergekit does not divide by the probability but by the share of the tensor's L1
    norm that happened to stay, which is biased: of [1, 10, 100, 1000] at density 0.5 it gives [74,
    146, 296, 526] on average; and it normalises by the sum of w_i, not of |w_i|, so that a task
    vector of negative weight is added where it alone has a say. `variant: paper` is what the
    authors do: e_i, then all of TIES, `ties` with `variant: paper` and the density `ties_density`:
    of each e_i the largest elements of the whole model are kept (everything, if fewer are left than
    that), the vote has no weights (but for their signs), and the mean divides by the number of
    those that agree, whatever normalize says.

    Attributes:
        weight: Weight of each task vector, any finite number.
        density: Probability of keeping an element, in [0, 1].
        normalize: Whether to divide by the weights of those that agree.
        rescale: Whether to divide what is kept by the probability of keeping it.
        lambda_: Factor on the merged task vector.
        ties_density: Share that the trim of variant paper keeps of each model, in [0, 1]; the
            authors mask 0.8. Has no effect otherwise.
        variant: "mergekit", or "paper": trim the whole model too, vote without weights, and divide
            by the number of those that agree.

    Cost: one pass, of which drawing is half; with variant paper three and a sample of the files,
        drawing anew in each.
    Source: Yu et al. 2024, Language models are super Mario,
        https://arxiv.org/abs/2311.03099
    """

    needs_base: ClassVar[bool] = True
    takes_base: ClassVar[bool] = True
    operates_on: ClassVar = "deltas"
    min_inputs: ClassVar[int] = 0
    error_factor: ClassVar[float] = 5.0  # beyond what rounds in ties, 1/p does
    laws: ClassVar[Mapping[Law, float]] = {"single": 2.0**-22, "copies_of_base": 0.0}

    weight: PerModel[float]
    density: PerModel[float] = per_model(1.0)
    normalize: bool = False
    rescale: bool = True
    lambda_: float = 1.0
    ties_density: float = 0.2
    variant: Literal["mergekit", "paper"] = "mergekit"

    def __post_init__(self) -> None:
        dropping.fill(self, len(self.weight))
        dropping.check_densities(self.density)
        if not 0 <= self.ties_density <= 1:
            raise ParameterError(
                "ties_density",
                f"is {self.ties_density:g}, expected a number in [0, 1]",
                hint="ties_density is the share that is kept, not a percentage",
            )

    def _ties(self) -> Ties:
        """Return what follows random pruning."""
        if self.variant == "mergekit":
            return Ties(weight=self.weight, normalize=self.normalize, lambda_=self.lambda_)
        share = PerModel([self.ties_density] * len(self.weight))
        return Ties(weight=self.weight, density=share, lambda_=self.lambda_, variant="paper")

    def scans(self) -> Sequence[Scan]:
        """Return what TIES scans, of the models as pruning leaves them."""
        return [replace(scan, of=self._pruned(scan)) for scan in self._ties().scans()]

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the base plus what agrees of what is kept."""
        assert slab.base is not None  # needs_base
        if not any(self.weight):
            return slab.base.clone()
        pruned = dropping.drop_all(slab, self.density, rescale=self.rescale)
        return self._ties().merge(pruned, scans)

    def _pruned(self, scan: Scan) -> Callable[[Slab, Scans], Rows]:
        def of(slab: Slab, scans: Scans) -> Rows:
            copy = replace(slab, tensors=slab.deltas.clone())
            pruned = dropping.drop_all(copy, self.density, rescale=self.rescale)
            return pruned.deltas if scan.of is None else scan.of(pruned, scans)

        return of

    def scratch_bytes(self, models: int, elements: int) -> int:
        """Return the bytes of copies that are pruned to be scanned, and of what TIES takes."""
        copies = 8 * models * elements if self.variant == "paper" else 0
        return copies + self._ties().scratch_bytes(models, elements)
