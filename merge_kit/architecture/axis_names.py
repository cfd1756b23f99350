"""Names of the tensors of decoders, with what their axes are.

A pattern is written as `axes of the tensor`: hidden, inter (intermediate), heads and kv (heads
times head_dim), and - for any other; a plus joins what is fused along one axis.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["", "norm", "embedding", "head", "matched"]


@dataclass(frozen=True, slots=True)
class Pattern:
    """A tensor of a layer, or outside of the layers.

    Attributes:
        axes: Words along each axis.
        after: Suffix of the norm in front of it, "" if there is none.
        matched: Suffix of the norm over heads behind it.
    """

    axes: tuple[tuple[str, ...], ...]
    after: str = ""
    role: Role = ""
    matched: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """What is known of an architecture.

    Attributes:
        layer: Pattern of a layer's path, up to the suffix.
        inside: By patterns of suffixes in a layer.
        outside: By patterns of whole names.
        refused: Why a size cannot change here, by the size.
        keys: Names that config.json has for sizes, where it has its own.
        rms_norm_eps: Its default.
        implicit_head_dim: Whether head_dim is hidden_size / num_attention_heads by default.
        whole_heads: Whether readers want hidden_size to be a multiple of num_attention_heads.
        factors_by_size: Whether readers count factors of long positions by hidden_size and
            num_attention_heads, whatever head_dim says.
    """

    layer: str
    inside: Mapping[str, Pattern]
    outside: Mapping[str, Pattern]
    refused: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    rms_norm_eps: float = 1e-6
    implicit_head_dim: bool = True
    whole_heads: bool = False
    factors_by_size: bool = False

    def key(self, size: str) -> str:
        """Return the name that config.json has for a size."""
        return self.keys.get(size, size)

    def find(self, name: str) -> tuple[Pattern, str] | None:
        """Return the pattern of a tensor, and the path of its layer; None if it is not known."""
        layer = re.match(self.layer, name)
        table = self.inside if layer else self.outside
        rest = name[layer.end() :] if layer else name
        for pattern, found in table.items():
            if re.fullmatch(pattern, rest):
                return found, layer[0] if layer else ""
        return None

    def norm(self, pattern: Pattern, prefix: str, names: Mapping[str, object]) -> str:
        """Return the name of the norm in front of a tensor."""
        if prefix:
            return f"{prefix}{pattern.after}"
        return pattern.after if pattern.after in names else pattern.after.removeprefix("model.")


def _tensor(axes: str, after: str = "", role: Role = "", matched: str = "") -> Pattern:
    return Pattern(tuple(tuple(axis.split("+")) for axis in axes.split()), after, role, matched)


_FIRST, _SECOND = "input_layernorm.weight", "post_attention_layernorm.weight"
_HEAD = _tensor("- hidden", "model.norm.weight", "head")

_NORMS = {
    r"(input|post_attention)_layernorm\.weight": _tensor("hidden", role="norm"),
    r"self_attn\.rotary_emb\.inv_freq": _tensor("-"),
}
_ATTENTION = {
    r"self_attn\.(q)_proj\.weight": _tensor(
        "heads hidden", _FIRST, "matched", "self_attn.q_norm.weight"
    ),
    r"self_attn\.q_proj\.bias": _tensor("heads", role="matched", matched="self_attn.q_norm.weight"),
    r"self_attn\.k_proj\.weight": _tensor(
        "kv hidden", _FIRST, "matched", "self_attn.k_norm.weight"
    ),
    r"self_attn\.k_proj\.bias": _tensor("kv", role="matched", matched="self_attn.k_norm.weight"),
    r"self_attn\.v_proj\.weight": _tensor("kv hidden", _FIRST),
    r"self_attn\.v_proj\.bias": _tensor("kv"),
    r"self_attn\.qkv_proj\.weight": _tensor("heads+kv+kv hidden", _FIRST),
    r"self_attn\.qkv_proj\.bias": _tensor("heads+kv+kv"),
    r"self_attn\.o_proj\.weight": _tensor("hidden heads"),
    r"self_attn\.o_proj\.bias": _tensor("hidden"),
    r"self_attn\.[qk]_norm\.weight": _tensor("-"),
}
_MLP = {
    r"mlp\.(gate|up)_proj\.weight": _tensor("inter hidden", _SECOND),
    r"mlp\.(gate|up)_proj\.bias": _tensor("inter"),
    r"mlp\.gate_up_proj\.weight": _tensor("inter+inter hidden", _SECOND),
    r"mlp\.gate_up_proj\.bias": _tensor("inter+inter"),
    r"mlp\.down_proj\.weight": _tensor("hidden inter"),
    r"mlp\.down_proj\.bias": _tensor("hidden"),
}
_MIXTRAL = {
    r"(block_sparse_moe|mlp)\.gate\.weight": _tensor("- hidden", _SECOND),
    r"(block_sparse_moe|mlp)\.experts\.\d+\.(w1|w3|gate_proj|up_proj)\.weight": _tensor(
        "inter hidden", _SECOND
    ),
    r"(block_sparse_moe|mlp)\.experts\.\d+\.(w2|down_proj)\.weight": _tensor("hidden inter"),
    r"mlp\.experts\.gate_up_proj": _tensor("- inter+inter hidden", _SECOND),
    r"mlp\.experts\.down_proj": _tensor("- hidden inter"),
}
_QWEN_MOE = {
    r"mlp\.(gate|shared_expert_gate)\.weight": _tensor("- hidden", _SECOND),
    r"mlp\.(experts\.\d+|shared_expert)\.(gate|up)_proj\.weight": _tensor("- hidden", _SECOND),
    r"mlp\.(experts\.\d+|shared_expert)\.down_proj\.weight": _tensor("hidden -"),
    r"mlp\.experts\.gate_up_proj": _tensor("- - hidden", _SECOND),
    r"mlp\.experts\.down_proj": _tensor("- hidden -"),
}
_GEMMA_NORMS = {r"(pre|post)_feedforward_layernorm\.weight": _tensor("hidden", role="norm")}
_LAYER = r"(model\.)?layers\.\d+\."
_OUTSIDE = {
    r"(model\.)?embed_tokens\.weight": _tensor("- hidden", role="embedding"),
    r"(model\.)?norm\.weight": _tensor("hidden", role="norm"),
    r"(lm_head|score)\.weight": _HEAD,
    r"(lm_head|score)\.bias": _tensor("-"),
    r"(model\.)?rotary_emb\.inv_freq": _tensor("-"),
}

_LAYER_NORM = (
    "its LayerNorms subtract the mean over the hidden size, which zeros beside it would move"
)
_BY_HEADS = "its hidden_size is the number of heads times head_dim, and cannot change"
_SCALED = (
    "it multiplies embeddings by the square root of hidden_size, which a tied head does not undo"
)
_OTHER = {
    "num_attention_heads": "only intermediate_size can change in this architecture",
    "num_key_value_heads": "only intermediate_size can change in this architecture",
}


def _llama(*tables: Mapping[str, Pattern], **more: object) -> Family:
    inside = {key: value for table in (_NORMS, *tables) for key, value in table.items()}
    return Family(_LAYER, inside, _OUTSIDE, **more)  # type: ignore[arg-type]


_GEMMA = _llama(_ATTENTION, _MLP, _GEMMA_NORMS, refused={"hidden_size": _SCALED, **_OTHER})
_GPT2 = Family(
    r"(transformer\.)?h\.\d+\.",
    {
        r"mlp\.c_fc\.weight": _tensor("hidden inter"),
        r"mlp\.c_fc\.bias": _tensor("inter"),
        r"mlp\.c_proj\.weight": _tensor("inter hidden"),
        r"mlp\.c_proj\.bias": _tensor("hidden"),
        r"attn\.c_(attn|proj)\.weight": _tensor("hidden -"),
        r"(ln_[12]|attn\.c_proj)\.(weight|bias)": _tensor("hidden"),
        r"attn\.(c_attn\.bias|masked_bias)": _tensor("-"),
        r"attn\.bias": _tensor("- - - -"),
    },
    {
        r"(transformer\.)?w[tp]e\.weight|lm_head\.weight": _tensor("- hidden"),
        r"(transformer\.)?ln_f\.(weight|bias)": _tensor("hidden"),
    },
    refused={
        "hidden_size": _LAYER_NORM,
        "num_attention_heads": _BY_HEADS,
        "num_key_value_heads": _BY_HEADS,
    },
    keys={
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
    },
)
_NEOX = Family(
    r"(gpt_neox\.)?layers\.\d+\.",
    {
        r"mlp\.dense_h_to_4h\.weight": _tensor("inter hidden"),
        r"mlp\.dense_h_to_4h\.bias": _tensor("inter"),
        r"mlp\.dense_4h_to_h\.weight": _tensor("hidden inter"),
        r"mlp\.dense_4h_to_h\.bias|attention\.dense\.bias": _tensor("hidden"),
        r"(input|post_attention)_layernorm\.(weight|bias)": _tensor("hidden"),
        r"attention\.query_key_value\.weight": _tensor("- hidden"),
        r"attention\.dense\.weight": _tensor("hidden -"),
        r"attention\.(query_key_value\.bias|masked_bias|rotary_emb\.inv_freq)": _tensor("-"),
        r"attention\.bias": _tensor("- - - -"),
    },
    {
        r"(gpt_neox\.)?embed_in\.weight|embed_out\.weight": _tensor("- hidden"),
        r"(gpt_neox\.)?final_layer_norm\.(weight|bias)": _tensor("hidden"),
    },
    refused={
        "hidden_size": _LAYER_NORM,
        "num_attention_heads": _BY_HEADS,
        "num_key_value_heads": _BY_HEADS,
    },
)

FAMILIES: Mapping[str, Family] = {
    "llama": _llama(_ATTENTION, _MLP, whole_heads=True),
    "mistral": _llama(_ATTENTION, _MLP),
    "qwen2": _llama(_ATTENTION, _MLP),
    "qwen3": _llama(_ATTENTION, _MLP, implicit_head_dim=False),
    "phi3": _llama(_ATTENTION, _MLP, rms_norm_eps=1e-5, factors_by_size=True),
    "mixtral": _llama(_ATTENTION, _MIXTRAL, rms_norm_eps=1e-5),
    "qwen2_moe": _llama(_ATTENTION, _MLP, _QWEN_MOE),
    "qwen3_moe": _llama(_ATTENTION, _MLP, _QWEN_MOE),
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
}
"""By model_type."""
