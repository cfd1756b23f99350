"""The merge that least disturbs the rows of each task vector, in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import hypot, isfinite
from typing import TYPE_CHECKING, ClassVar

from merge_kit.errors import ParameterError
from merge_kit.methods import spectral
from merge_kit.methods.base import Grain, Law, MergeMethod, PerModel, Scans, Slab, per_model
from merge_kit.methods.dropping import fill
from merge_kit.methods.lazy import torch
from merge_kit.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register("wudi")
@dataclass(frozen=True, kw_only=True)
class WUDI(MergeMethod):
    """Find the task vector that interferes least with each of the tasks (WUDI, in closed form).

    M = argmin sum(|(M - w_i d_i) d_i^T|^2 / |d_i|^2) = (sum(w_i d_i G_i)) (sum(G_i))^-1,
    G_i = d_i^T d_i / |d_i|^2, out = base + lambda * M

    The inputs of a linear layer lie mostly in the rows of its task vector, so that M does for the
    inputs of each task about what its own task vector does: it is regmean with the task vectors in
    place of data. In directions of which no task vector says more than the rounding of float32, M
    is zero, as it is where gradient descent from the sum of the task vectors ends. Task vectors
    that are zero are left out. Matrices are as in tsv. What is no matrix is base + other_weight *
    sum(w_i d_i).

    The minimum can lie far from all task vectors where their spectra fall steeply, as they do in
    some trained models: with ridge r, M minimises the same sum plus r n |M - sum(w_i d_i)|^2 /
    columns, n the number of tasks. 1 is the mean eigenvalue of sum(G_i), and the one to begin with;
    it is close to stopping descent from the sum early, as the authors do.

    Scope: each matrix. Vote: none. Normalisation: none.

    Differences: mergekit has no such method. The authors take 300 steps of Adam at a rate of 1e-5
    from the sum of the task vectors, which stop short of the minimum that is computed here: their
    published figures are of those steps. Their code divides 0 by 0 for a task vector of zero.

    Attributes:
        weight: Weight of each task vector, any finite number; 0 leaves it out.
        lambda_: Factor on the merged task vector.
        ridge: How strongly M is held to the sum of the task vectors, from 0.
        other_weight: Factor on the sum of task vectors of what is no matrix; by default lambda
            divided by the number of models whose weight is not 0.

    Cost: whole tensors in float64; for each matrix one singular value decomposition of all task
        vectors together: minutes per billion parameters, as the plan says.
    Source: Cheng et al. 2025, Whoever started the interference should end it,
        https://arxiv.org/abs/2503.08099
    """

    needs_base: ClassVar[bool] = True
    takes_base: ClassVar[bool] = True
    operates_on: ClassVar = "deltas"
    grain: ClassVar[Grain] = "tensor"
    min_inputs: ClassVar[int] = 1
    error_factor: ClassVar[float] = 8.0  # the task vectors are rounded before they are solved for
    laws: ClassVar[Mapping[Law, float]] = {
        "single": 2.0**-20,
        "copies_of_base": 0.0,
        "permute_models": 2.0**-18,
        "permute_rows": 2.0**-18,
    }

    weight: PerModel[float] = per_model(1.0)
    lambda_: float = 1.0
    ridge: float = 0.0
    other_weight: float | None = None

    def __post_init__(self) -> None:
        fill(self, len(self.weight))
        if not (self.ridge >= 0 and isfinite(self.ridge)):
            hint = "0 for the minimum itself, 1 to stay close to the sum of the task vectors"
            raise ParameterError("ridge", f"is {self.ridge:g}, expected a number from 0", hint=hint)

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the base plus the merged task vector."""
        del scans
        weights = self.weight or (1.0,) * len(slab.deltas)
        return spectral.merged(slab, weights, self.lambda_, self.other_weight, self._solve)

    def scratch_bytes(self, models: int, elements: int) -> int:
        """Return the bytes of task vectors, products and work space in float64."""
        return 8 * elements * (9 * models + 6)  # measured: 83 of these 96 for 10 of (350, 3000)

    def flops(self, name: str, shape: tuple[int, ...], models: int) -> float:
        """Return the operations of one decomposition of all task vectors."""
        found = spectral.matrices(name, shape)
        if found is None:
            return 0.0
        count, rows, columns = found
        return count * spectral.svd_flops((models * rows, columns), name)

    def _solve(self, deltas: list[Tensor], floors: list[float], name: str) -> Tensor:
        """Return the minimum, from the singular vectors of all task vectors one below the other.

        A weight makes |d_i| larger, and nothing else. Directions of small S are made larger by
        1 / S: those that are the rounding of float32 must not be there.
        """
        lengths = [spectral.norm(delta) for delta in deltas]
        used = [(delta, length) for delta, length in zip(deltas, lengths, strict=True) if length]
        if not used:
            return torch.zeros_like(deltas[0])
        stacked = torch.cat([delta / length for delta, length in used])
        shares = [floor / length for floor, length in zip(floors, lengths, strict=True) if length]
        parts = spectral.decompose(stacked, hypot(*shares), name)
        own = parts.left.split(deltas[0].shape[0])  # type: ignore[no-untyped-call]
        blocks = [(block, length) for block, (_, length) in zip(own, used, strict=True)]
        if self.ridge:
            columns = deltas[0].shape[1]
            return _held(blocks, parts.values, self.ridge * len(used) / columns) @ parts.right
        return _least(blocks, parts.values) @ parts.right


def _least(blocks: Sequence[tuple[Tensor, float]], values: Tensor) -> Tensor:
    """Return M V of the minimum.

    With D of the d_i / |d_i| = Z S V^T, and Z_i the rows of Z that belong to d_i:
    d_i G_i = |d_i| Z_i S^2 Z_i^T Z_i S V^T, and the inverse of sum(G_i) is V S^-2 V^T.

    Args:
        blocks: (Z_i, |d_i|) of each task.
        values: S.
    """
    found = torch.zeros_like(blocks[0][0])
    for own, length in blocks:
        inside = (own.T @ own) * values.square().unsqueeze(1) / values
        found.add_((own @ inside).mul_(length))
    return found


def _held(blocks: Sequence[tuple[Tensor, float]], values: Tensor, ridge: float) -> Tensor:
    """Return M V where M is held to the sum of the task vectors.

    M = D + (sum((w_i d_i - D) G_i)) (sum(G_i) + ridge)^-1, D = sum(w_i d_i).
    """
    total = torch.zeros_like(blocks[0][0])
    for own, length in blocks:
        total.add_((own * values).mul_(length))
    pull = torch.zeros_like(total)
    for own, length in blocks:
        gram = (own.T @ own) * values * values.unsqueeze(1)
        pull.add_(((own * values).mul_(length).sub_(total)) @ gram)
    return total.add_(pull.div_(values.square().add(ridge)))
