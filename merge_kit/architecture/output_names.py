"""Names of what stands in a layer: what writes into the stream, and what works inside a branch."""

from __future__ import annotations

from collections.abc import Mapping

OUTPUTS = frozenset(
    {
        "o_proj",
        "out_proj",
        "attention.dense",
        "c_proj",
        "Wo",
        "wo",
        "down_proj",
        "dense_4h_to_h",
        "fc2",
        "fc_out",
        "w2",
        "output_linear",
    }
)
"""Last parts of the paths of modules that end a branch; a dense only where it ends attention."""

BRANCH_INPUTS = frozenset(
    {
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "q_attn", "Wqkv"),
        *("q_b_proj", "kv_b_proj", "wqkv"),
        *("gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "c_fc", "fc1", "fc_in", "Wi"),
        *("dense_h_to_4h", "input_linear"),
        *("in_proj", "in_proj_qkvz", "in_proj_qkv"),
    }
)
"""Those of modules that begin one: the same parent must have an output."""

INSIDE = frozenset(
    {
        *("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm"),
        *("norms",),  # of heads, each by itself
        *("q_a_proj", "kv_a_proj_with_mqa", "q_a_layernorm", "kv_a_layernorm"),
        *("wq_b", "wk", "weights_proj"),
        *("sinks", "attention_sink", "masked", "bias", "rotary_emb.inv_freq", "inv_freq"),
        *("gate", "router", "wg", "shared_expert_gate", "e_score_correction", "expert", "layer"),
        *("A_log", "D", "conv1d", "conv", "x_proj", "dt_proj", "dt", "norm"),
        *("b_layernorm", "c_layernorm", "dt_layernorm"),
        *("in_proj_ba", "in_proj_a", "in_proj_b", "in_proj_z"),
        *("alpha_n", "alpha_p", "beta", "eps"),
    }
)
"""Those of what works inside a branch, between its input and its output."""

PATHS = frozenset(
    {
        *("self_attn", "self_attention", "attention", "attn", "encoder_attn"),
        *("mlp", "ffn", "feed_forward", "block_sparse_moe", "shared_mlp"),
        *("experts", "shared_expert", "shared_experts", "router", "gate", "moe_statics", "indexer"),
        *(
            "q_layernorm",
            "k_layernorm",
            "act_fn",
            "mixer",
            "mamba",
            "linear_attn",
            "conv",
            "rotary_emb",
        ),
    }
)
"""Parts of the paths that lead there, beside numbers."""

NORMS_BEFORE = frozenset(
    {
        *("input_layernorm", "norm_1", "norm_2", "norm", "ln_attn", "ln_mlp"),
        *("pre_feedforward_layernorm", "pre_ff_layernorm", "pre_mlp_layernorm"),
        *("attn_norm", "ffn_norm", "mlp_norm", "operator_norm", "attention_norm"),
        *("attention_layernorm", "feedforward_layernorm"),
    }
)
"""Norms of the layer that stand before a branch: a bias of theirs does no harm."""

NORMS = NORMS_BEFORE | frozenset(
    {
        *("post_attention_layernorm", "post_feedforward_layernorm", "post_mlp_layernorm"),
        *("post_self_attn_layernorm", "post_ffn_norm", "post_operator_norm"),
    }
)
"""All that are known to stand inside a branch, before it or at its end."""

_DECODERS = frozenset({"opt", "xglm", "biogpt", "whisper", "mbart", "pegasus", "m2m_100"})
_GPT = frozenset({"gpt2", "gpt_bigcode", "gpt_neo", "gptj", "codegen", "imagegpt"})

TYPED_NORMS: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("ln_1", "ln_2"), _GPT),
    **dict.fromkeys(
        ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"), _DECODERS
    ),
}
"""Norms that stand before a branch in models of these types, and on the stream in others."""

TYPED: Mapping[str, frozenset[str]] = {**TYPED_NORMS, "attention.dense": frozenset({"gpt_neox"})}
"""Those, and what else is named alike in models that have a way past it and models without."""

ODD: tuple[tuple[str, bool | None, str], ...] = (
    ("do_layer_norm_before", False, "its norms stand on the stream itself"),
    ("apply_residual_connection_post_layernorm", True, "the stream goes on behind a norm"),
    ("scale_depth", None, "what each layer adds depends on how many there are"),
    ("num_kv_shared_layers", None, "later layers would read its keys and values"),
    ("use_cla", True, "later layers would read its keys and values"),
)
"""Keys of config.json by which no layer can be added without a change, the value that says so (None
for every value but 0, false and null), and what happens."""

PLAIN = frozenset({"minimax", "openai-gpt"})
"""Types of models that are named as others are, and have no way past their norms."""
