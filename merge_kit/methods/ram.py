"""Merging of agents trained by reinforcement learning, whose changes are sparse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from merge_kit.methods.base import Law, MergeMethod, Scans, Slab
from merge_kit.methods.overlap import check_epsilon, keep_changes
from merge_kit.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register("ram")
@dataclass(frozen=True, kw_only=True)
class RAM(MergeMethod):
    """Average each element over the models that changed it (reinforced agent merging).

    out = base + sum(m_i d_i) / max(1, sum(m_i)), element by element, with d_i = x_i - base, and
    m_i = 1 where |d_i| > epsilon, else 0

    What only one model changed is taken over whole, what several changed is averaged over those,
    and what is at most epsilon counts as not changed and is dropped. ramplus_tl strengthens what
    only one model changed.

    Scope: each element by itself. Vote: none. Normalisation: by the number of models that changed
    the element; there are no weights.

    Differences: mergekit computes deltas in the dtype of the models; here they are float32, so
    that changes close to epsilon may fall on its other side. The authors' code does the same with
    models in float32.

    Attributes:
        epsilon: Largest magnitude that is no change, at least 0.

    Cost: one pass.
    Source: Yuan et al. 2026, Behavior knowledge merge in reinforced agentic models,
        https://arxiv.org/abs/2601.13572
    """

    needs_base: ClassVar[bool] = True
    takes_base: ClassVar[bool] = True
    operates_on: ClassVar = "deltas"
    min_inputs: ClassVar[int] = 0
    error_factor: ClassVar[float] = 2.0  # the subtraction rounds too
    laws: ClassVar[Mapping[Law, float]] = {
        "copies": 0.0,
        "copies_of_base": 0.0,
        "permute_models": 2.0**-20,
        "permute_rows": 0.0,
    }

    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        check_epsilon(self.epsilon)

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the base plus the mean of what was changed."""
        del scans
        assert slab.base is not None  # needs_base
        if not len(slab.deltas):
            return slab.base.clone()
        count = keep_changes(slab.deltas, self.epsilon)
        total = slab.deltas[0]
        for row in slab.deltas[1:]:
            total.add_(row)
        return total.div_(count.clamp_min_(1)).add_(slab.base)

    def scratch_bytes(self, models: int, elements: int) -> int:
        """Return the bytes of the count and of what is added to it."""
        del models
        return 16 * elements
