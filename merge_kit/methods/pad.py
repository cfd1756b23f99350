"""A model made wider by zeros, so that it computes what it did."""

from __future__ import annotations

from dataclasses import dataclass

from merge_kit.methods.registry import register
from merge_kit.methods.widths import WidthMethod


@register("pad")
@dataclass(frozen=True, kw_only=True)
class Pad(WidthMethod):
    """Make a model wider without changing what it computes: zeros for new rows and columns.

    hidden_size H to H': zeros behind every row and column of the hidden size; the mean square of a
    hidden state falls by H/H', so weights of norms take the factor sqrt(H/H'), rms_norm_eps H/H'.
    intermediate_size: zero rows of the gate and up projections, zero columns of the down one.
    heads: zero rows of q, k and v for whole groups at the end, zero columns of o.

    x/sqrt(mean(x^2) + eps) is then the same: sqrt(H/H') comes out of the root and meets the factor.
    Where queries and keys are normalised by head with the same rms_norm_eps (Qwen3), their
    projections take the factor too, and the norm takes it out again. Logits are those of the narrow
    model up to rounding; a tied head stays tied. Zeros are no start for training by themselves:
    what is multiplied by zeros on both sides gets no gradient. A merge with a wider model fills
    them.

    The sizes are given, or those of base_model, which lends nothing else; what is not given stays.
    Queries per key and value head stay, and so does head_dim: the frequencies of positions and the
    scale of the softmax depend on it. Gemma, GPT-2 and GPT-NeoX take an intermediate_size only.
    Experts of Qwen MoEs have a moe_intermediate_size of their own, which stays.

    Attributes:
        hidden_size: At least that of the model.
        intermediate_size: At least that of the model.
        num_attention_heads: At least that of the model, with num_key_value_heads in proportion.
        num_key_value_heads: At least that of the model.

    Cost: one pass.
    Source: Chen et al. 2015, Net2Net, https://arxiv.org/abs/1511.05641, for function-preserving
        widening in general; the norms as derived above.
    """
