"""A deeper model of one or two: layers repeated, summed at the seam, or added as identities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from merge_kit.errors import ParameterError
from merge_kit.methods.registry import register
from merge_kit.methods.structures import StructureMethod


@register("depth_upscale")
@dataclass(frozen=True, kw_only=True)
class DepthUpscale(StructureMethod):
    """Put a second copy of a model's layers on top of the first (SOLAR), or add identity layers.

    dropped = layers 0 .. n-m-1 of the lower copy, then layers m .. k-1 of the upper
    summed = layers 0 .. n-m-1 of the lower copy, m pairs, then layers m .. k-1 of the upper
    pair_j = (1 - t) lower_(n-m+j) + t upper_j, j from 0 to m-1
    expanded = all n layers, after each layer floor((i+1) n/P) - 1 a copy of it, i from 0 to P-1

    One model of n layers is both copies (k is n); of two, the first is the lower one, of n layers,
    and the second the upper one, of k. m is the overlap: drop makes n + k - 2 m layers, sum
    n + k - m, so that 32 layers become 48 by drop with m 8, and by sum with m 16. Where
    target_layers has drop leave out an odd number, the lower copy keeps one more. The embeddings
    are the lower copy's, the final norm and the head the upper's.

    block_expansion adds P copies, target_layers less n, whose output projections (of attention, and
    of MLP or experts, with their biases) are zero. They pass on what they get, so that the model
    computes what it did until they are trained. Layers that would change it all the same (norms
    without a way past them, a norm with a bias behind the projection), or that hold a tensor of
    which it is not known what it does, are refused.

    Differences: the SOLAR paper drops the overlap, and so does the default. A textbook reads it as
    layers that are summed pairwise, two into one, which for 32 layers gives 48 too, of other
    weights: that is sum. There the mean is taken, as here by default.

    Attributes:
        target_layers: How many layers the result has, in place of overlap: more than the deeper
            model has, at most those of both copies.
        overlap: m, from 0: layers that either copy leaves out where they meet (drop), or pairs of
            layers that become one (sum). The result must be deeper than either model.
        overlap_mode: What becomes of layers where the copies meet: drop or sum.
        blend: How sum merges a pair: linear, or slerp between whole tensors.
        t: Share of the upper copy in a summed pair, in [0, 1]; a list spans the seam from its
            lowest pair to its highest, so that [0, 1] fades one copy into the other.
        block_expansion: Whether identities are added, layers that change nothing, in place of a
            second copy; target_layers says how many layers there are then.

    Cost: a copy of the files' bytes; for summed pairs one pass, two for slerp.
    Source: Kim et al. 2023, SOLAR 10.7B, https://arxiv.org/abs/2312.15166; Wu et al. 2024, LLaMA
        Pro, https://arxiv.org/abs/2401.02415
    """

    takes_base: ClassVar[bool] = True
    min_inputs: ClassVar[int] = 0
    max_inputs: ClassVar[int | None] = 2
    spans_layers: ClassVar[frozenset[str]] = frozenset({"t"})

    target_layers: int | None = None
    overlap: int | None = None
    overlap_mode: Literal["drop", "sum"] = "drop"
    blend: Literal["linear", "slerp"] = "linear"
    t: float = 0.5
    block_expansion: bool = False

    def __post_init__(self) -> None:
        share(self.t)
        if self.block_expansion and self.overlap is not None:
            hint = "write target_layers, the layers with those that are added"
            raise ParameterError("overlap", "means nothing with block_expansion", hint=hint)
        if self.target_layers is None and self.overlap is None:
            hint = "say how many layers the result has"
            other = "" if self.block_expansion else ", and so is overlap; expected one of them"
            raise ParameterError("target_layers", f"is missing{other}", hint=hint)
        if self.target_layers is not None and self.overlap is not None:
            problem = "stands beside target_layers, expected one of them"
            raise ParameterError("overlap", problem, hint="either follows from the other")
        if self.overlap is not None and self.overlap < 0:
            problem = f"is {self.overlap}, expected a whole number from 0"
            raise ParameterError("overlap", problem, hint="0 puts one copy on the other, whole")
        if self.target_layers is not None and self.target_layers < 1:
            problem = f"is {self.target_layers}, expected a whole number from 1"
            hint = "write the layers of the result, more than the model has"
            raise ParameterError("target_layers", problem, hint=hint)


def share(t: float) -> float:
    """Return a share of the upper copy.

    Raises:
        ParameterError: If it is none.
    """
    if not (math.isfinite(t) and 0 <= t <= 1):
        problem = f"is {t:g}, expected a number in [0, 1]"
        raise ParameterError("t", problem, hint="0 is the lower copy, 1 the upper")
    return t
