"""A model in another basis of its hidden states, of as many, fewer or more directions."""

from __future__ import annotations

from dataclasses import dataclass

from merge_kit.errors import ParameterError
from merge_kit.methods.registry import register
from merge_kit.methods.widths import WidthMethod


@register("project")
@dataclass(frozen=True, kw_only=True)
class Project(WidthMethod):
    """Bring a model to another hidden size by a basis: every hidden state x becomes P x.

    what writes to hidden states: P W, P b; what reads them: W diag(g) P^+, with g the weights of
    the norm in front; embeddings: E P^T; norms: sqrt(H/H') everywhere, rms_norm_eps times H/H'.

    A norm by the mean square commutes with a rotation, its weights do not: they go into the
    matrices that follow (q, k, v; gate, up, router, experts; the head). A tied head becomes one of
    its own for the same reason, and the config says so. P^+ is the pseudo-inverse; for the SVD
    basis, and any other whose rows or columns are orthonormal, P^T. With the SVD basis and a hidden
    size that is not smaller, the function is preserved: a rotation, and zeros. A smaller one keeps
    the directions in which embeddings are longest, and loses the others. A matrix that is not
    orthonormal changes lengths, and with them what the norms do.

    The other sizes change by the rules of `pad` and `crop`, each axis by itself. The sizes are
    given, or those of base_model, which lends nothing else; what is not given stays, but for a
    hidden_size that the matrix of the basis tells. What cannot change is listed under `pad`.

    Differences: SliceGPT takes the basis from activations, another one for each layer, with
    matrices between the residual connections; here one basis serves the whole model, so that the
    result is of the same architecture.

    Attributes:
        basis: "svd", right singular vectors of the embedding matrix by falling singular values, the
            largest number of each made positive; or a path of a safetensors file that holds P, of
            shape (H', H), written FILE:TENSOR where it holds several.
        hidden_size: Any number.
        intermediate_size: Any number.
        num_attention_heads: Any number, with num_key_value_heads in proportion.
        num_key_value_heads: Any number.

    Cost: about four passes over what writes to hidden states, more for a large hidden size, one
        over the rest, and 2 H' operations for each weight; a decomposition of an (H, H) matrix.
    Source: Ashkboos et al. 2024, SliceGPT, https://arxiv.org/abs/2401.15024
    """

    basis: str = "svd"

    def __post_init__(self) -> None:
        WidthMethod.__post_init__(self)
        if not self.basis.strip():
            hint = "write svd, or the path of a safetensors file"
            raise ParameterError("basis", "is empty, expected svd or a path", hint=hint)
