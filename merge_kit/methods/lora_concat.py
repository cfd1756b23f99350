"""Adapters side by side: their sum, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from merge_kit.methods.base import PerModel, per_model
from merge_kit.methods.dropping import fill
from merge_kit.methods.registry import register
from merge_kit.methods.updates import AdapterMethod


@register("lora_concat")
@dataclass(frozen=True, kw_only=True)
class LoraConcat(AdapterMethod):
    """Lay the factors of adapters side by side, so that they add up exactly; ranks add up too.

    out = sum(w_i s_i b_i a_i) = s * [(w_1 s_1 / s) b_1 ... (w_n s_n / s) b_n] [a_1; ...; a_n]

    b_i (outputs, r_i) and a_i (r_i, inputs) are the factors of a module, s_i its scale (alpha /
    rank, with rsLoRA alpha / sqrt(rank)). The scale s of the result is the w_i s_i of the largest
    magnitude: the factors of that adapter are copied bit for bit, and each element of the other b_i
    is rounded once. A module that one adapter alone has, with weight 1, stays as it is, scale
    included. An adapter that is named twice counts with the sum of its weights.

    Scope: each module by itself. Vote: none. Normalisation: none.

    Differences: peft's combination "cat" multiplies a by weights and scales, fills modules of
    smaller rank with zeros up to one rank, and leaves use_rslora on, whose scale then comes on top.

    Attributes:
        saved: What becomes of tensors that adapters hold whole, where these differ: error, mean, or
            first, that of the first adapter that holds one.
        weight: Weight of each adapter, any finite number.

    Cost: the adapters are read once and written once.
    Source: Hu et al. 2021, LoRA, https://arxiv.org/abs/2106.09685; Wang et al. 2024, FLoRA
        (stacking), https://arxiv.org/abs/2409.05976
    """

    works_on: ClassVar = "concatenation"

    weight: PerModel[float] = per_model(1.0)

    def __post_init__(self) -> None:
        fill(self, len(self.weight))

    def keeps_one(self, rank: int) -> bool:
        """Return True: one adapter is as it is."""
        del rank
        return True

    def rank_bound(self, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        """Return the sum of the ranks."""
        del shape
        return sum(ranks)
