"""The experts of one mixture in the order in which another one has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from merge_kit.methods.registry import register
from merge_kit.methods.structures import StructureMethod


@register("match_experts")
@dataclass(frozen=True, kw_only=True)
class MatchExperts(StructureMethod):
    """Put the experts of a mixture in the order that fits those of base_model best.

    expert i of layer l = expert p(i) of the model, where the order p of that layer makes the sum of
    |r_i - m_p(i)|^2 over all experts smallest; r_i are the weights of the reference's expert i,
    m_j those of the model's expert j, all its tensors one after the other

    Each layer has an order of its own. Router rows, and biases and corrections with one entry an
    expert, follow the same order, so the result computes what the model computed; then it can be
    merged with the reference tensor by tensor. Names and config are the model's.

    The smallest sum of squares is the largest sum of dot products: what all experts have in common
    (copies of one dense model, say) and a factor on all of them change nothing, and the mean of
    matched experts loses the least. Cosines would make experts that differ only in size look
    alike, and so permuted copies could not be told apart. Where several orders fit equally well
    (experts that are copies), the model's own is kept if it is one of them.

    Attributes:
        by: What is compared: "weights" of the experts, or their rows of the "router", which is
            faster, and fits models whose routers were trained little.

    Cost: the experts of both models are read once to compare them, those of the model once more;
        2 E^2 operations for each weight of an expert, and a linear assignment of E experts a layer.
    Source: Ainsworth et al. 2023, Git Re-Basin (weight matching), https://arxiv.org/abs/2209.04836
    """

    needs_base: ClassVar[bool] = True
    takes_base: ClassVar[bool] = True
    max_inputs: ClassVar[int | None] = 1

    by: Literal["weights", "router"] = "weights"
