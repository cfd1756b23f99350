"""Configs as models are published with: each layer of a stack is in transformers what it was.

The layers are built without numbers; a layer's kind is its modules, their shapes, and what they
keep of the config about windows and positions.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers

from merge_kit.architecture.stacking import stacked_config
from merge_kit.architecture.stacks import Stack
from merge_kit.errors import PlanError

DEPTH = 8
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 32,
    "pad_token_id": 0,
    "num_hidden_layers": DEPTH,
}
WINDOW = {"sliding_window": 4}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
SHARED = {"shared_expert_intermediate_size": 8}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
LATENT |= {"v_head_dim": 8, "n_group": 1, "topk_group": 1, "n_routed_experts": 4}
LATENT |= {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
MAMBA = {"use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 2, "num_experts": 2}
LLAMA4 = {"num_local_experts": 2, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 2}
LISTS = ("layer_types", "no_rope_layers", "moe_layers", "_sliding_window_pattern")

FIELD: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma2": ("Gemma2Config", WINDOW, {}),
    "gemma3": ("Gemma3TextConfig", WINDOW, {"sliding_window_pattern": 6}),
    "gemma3-bare": ("Gemma3TextConfig", WINDOW, {}),
    "qwen2": ("Qwen2Config", {**WINDOW, "use_sliding_window": True, "max_window_layers": 4}, {}),
    "qwen2-unused": ("Qwen2Config", {"use_sliding_window": False, "max_window_layers": 4}, {}),
    "qwen2_moe": ("Qwen2MoeConfig", {**EXPERTS, **SHARED, "decoder_sparse_step": 2}, {}),
    "qwen3_moe": ("Qwen3MoeConfig", {**EXPERTS, "mlp_only_layers": [0, 3]}, {}),
    "cohere2": ("Cohere2Config", WINDOW, {"sliding_window_pattern": 4}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 2, "num_experts_per_tok": 1}, {}),
    "llama4": ("Llama4TextConfig", LLAMA4, {}),
    "deepseek_v2": ("DeepseekV2Config", {**LATENT, "first_k_dense_replace": 1}, {}),
    "deepseek_v3": ("DeepseekV3Config", {**LATENT, "first_k_dense_replace": 3}, {}),
    "jamba": ("JambaConfig", {**MAMBA, "attn_layer_period": 4, "attn_layer_offset": 2}, {}),
    "smollm3": ("SmolLM3Config", {}, {}),
    "phi3": ("Phi3Config", WINDOW, {}),
    "gpt_neox": ("GPTNeoXConfig", {}, {}),
}
"""Class; its sizes; keys that are written although the class does not write them."""

ALWAYS = {
    "qwen2_moe": {"decoder_sparse_step"},
    "deepseek_v2": {"first_k_dense_replace"},
    "deepseek_v3": {"first_k_dense_replace"},
    "jamba": {"attn_layer_period", "expert_layer_period"},
}
REFUSED = {
    "gemma2": {"layer_types"},
    "gemma3": {"sliding_window_pattern"},
    "gemma3-bare": {"sliding_window_pattern"},
    "qwen2": {"max_window_layers"},
    "cohere2": {"sliding_window_pattern"},
    "gpt_oss": {"layer_types"},
    "llama4": {"no_rope_layer_interval"},
    "smollm3": {"no_rope_layer_interval"},
}
"""What some orders are refused by: with lists or without, and without them."""

ORDERS = (
    [*range(6), *range(2, 8)],
    [*range(4), *range(4)],
    [0, 2, 4, 6],
    [0, 1, 2, 3, 4, 5, 6, 7, 7],
    [7, 6, 5, 4, 3, 2, 1, 0],
    [0, 0, 6, 0, 2],
    [1, 3, 5, 7, 1],
    [0, 1, 2, 3, 4, 5],
)
KEPT = ("sliding_window", "is_sliding", "layer_type", "attention_type", "use_rope", "block_type")


def field(kind: str, *, lists: bool) -> dict[str, Any]:
    """Return a config with its lists of kinds, or without, as older files are."""
    name, sizes, more = FIELD[kind]
    made = getattr(transformers, name)(**{**SIZES, **sizes}).to_json_string(use_diff=False)
    config: dict[str, Any] = json.loads(made)
    return config if lists else {k: v for k, v in config.items() if k not in LISTS} | more


def kinds(config: dict[str, Any]) -> list[list[str]]:
    """Return what each layer is made of, as transformers builds it."""
    made = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(made)
    (layers,) = (m for n, m in model.named_modules() if n in ("model.layers", "gpt_neox.layers"))
    return [_kind(layer) for layer in layers]


def _kind(layer: Any) -> list[str]:
    parts = [f"{name} {tuple(weight.shape)}" for name, weight in layer.named_parameters()]
    for name, module in layer.named_modules():
        parts.append(f"{name} {type(module).__name__}")
        parts += [f"{name}.{key} {vars(module)[key]}" for key in KEPT if key in vars(module)]
    return sorted(parts)


@pytest.mark.parametrize("lists", [True, False], ids=["lists", "numbers"])
@pytest.mark.parametrize("kind", FIELD)
def test_each_layer_keeps_its_kind_or_the_stack_is_refused_by_a_key(kind, lists):
    config = field(kind, lists=lists)
    text, before = json.dumps(config), kinds(config)
    stack = Stack("model.layers", DEPTH, tuple(range(DEPTH)))
    refused = set()
    for order in ORDERS:
        try:
            after = json.loads(stacked_config(text, stack, [(text, layer) for layer in order]))
        except PlanError as error:
            refused.add(error.problem.split()[0])
        else:
            assert kinds(after) == [before[layer] for layer in order], order
    assert refused == (set() if lists else REFUSED.get(kind, set())) | ALWAYS.get(kind, set())
