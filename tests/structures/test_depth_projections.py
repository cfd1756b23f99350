"""Output projections by the names and shapes of a layer's tensors, and layers that are refused."""

from __future__ import annotations

import pytest

from merge_kit.architecture.output_projections import output_projections
from merge_kit.errors import PlanError

H, WIDE = 4, 6
ATTENTION = {f"self_attn.{n}_proj.weight": (H, H) for n in "qkvo"}
MLP = {"mlp.gate_proj.weight": (WIDE, H), "mlp.up_proj.weight": (WIDE, H),
       "mlp.down_proj.weight": (H, WIDE)}  # fmt: skip
NORMS = {"input_layernorm.weight": (H,), "post_attention_layernorm.weight": (H,)}
LLAMA = {**ATTENTION, **MLP, **NORMS}


def biases(*modules: str, size: int = H) -> dict[str, tuple[int, ...]]:
    return {f"{module}.bias": (size,) for module in modules}


def experts(lead: str, out: str, others: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    found = {f"{lead}.{i}.{name}.weight": (WIDE, H) for i in range(2) for name in others}
    return found | {f"{lead}.{i}.{out}.weight": (H, WIDE) for i in range(2)}


GPT2 = {
    "attn.c_attn.weight": (H, 3 * H), "attn.c_proj.weight": (H, H), "attn.c_proj.bias": (H,),
    "mlp.c_fc.weight": (H, WIDE), "mlp.c_proj.weight": (WIDE, H), "mlp.c_proj.bias": (H,),
    "ln_1.weight": (H,), "ln_1.bias": (H,), "ln_2.weight": (H,), "ln_2.bias": (H,),
    "attn.bias": (1, 1, 8, 8), "attn.masked_bias": (),
}  # fmt: skip
NEOX = {
    "attention.query_key_value.weight": (3 * H, H),
    "attention.dense.weight": (H, H),
    "attention.rotary_emb.inv_freq": (2,),
    "mlp.dense_h_to_4h.weight": (WIDE, H),
    "mlp.dense_4h_to_h.weight": (H, WIDE),
    **NORMS,
    **biases("attention.dense", "mlp.dense_4h_to_h", "input_layernorm", "post_attention_layernorm"),
}
OPT = {
    **{f"self_attn.{n}.weight": (H, H) for n in ("q_proj", "k_proj", "v_proj", "out_proj")},
    "fc1.weight": (WIDE, H),
    "fc2.weight": (H, WIDE),
    **{f"{n}.weight": (H,) for n in ("self_attn_layer_norm", "final_layer_norm")},
    **biases("self_attn.out_proj", "fc2", "self_attn_layer_norm", "final_layer_norm"),
}
FALCON = {
    "self_attention.query_key_value.weight": (3 * H, H),
    "self_attention.dense.weight": (H, H),
    "mlp.dense_h_to_4h.weight": (WIDE, H),
    "mlp.dense_4h_to_h.weight": (H, WIDE),
    **{f"{n}.weight": (H,) for n in ("ln_attn", "ln_mlp")},
    **biases("ln_attn", "ln_mlp"),
}
MPT = {
    "attn.Wqkv.weight": (3 * H, H), "attn.out_proj.weight": (H, H), "ffn.up_proj.weight": (WIDE, H),
    "ffn.down_proj.weight": (H, WIDE), "norm_1.weight": (H,), "norm_2.weight": (H,),
}  # fmt: skip
MAMBA = {
    "mixer.A_log": (WIDE, 2), "mixer.D": (WIDE,), "mixer.conv1d.weight": (WIDE, 1, 4),
    "mixer.in_proj.weight": (2 * WIDE, H), "mixer.x_proj.weight": (5, WIDE),
    "mixer.dt_proj.weight": (WIDE, 1), "mixer.out_proj.weight": (H, WIDE), "norm.weight": (H,),
}  # fmt: skip
GATED = {f"linear_attn.{n}": (2,) for n in ("A_log", "dt_bias")} | {
    "linear_attn.in_proj_qkvz.weight": (WIDE, H),
    "linear_attn.out_proj.weight": (H, WIDE),
}
SHARED = {f"mlp.shared_expert.{n}": shape for n, shape in
          [("up_proj.weight", (WIDE, H)), ("down_proj.weight", (H, WIDE))]}  # fmt: skip

CASES = {
    "llama": (LLAMA, ["self_attn.o_proj.weight", "mlp.down_proj.weight"]),
    "biases": ({**LLAMA, **biases("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")},
               ["self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight",
                "mlp.down_proj.bias"]),
    "phi3": ({"self_attn.qkv_proj.weight": (3 * H, H), "self_attn.o_proj.weight": (H, H),
              "mlp.gate_up_proj.weight": (2 * WIDE, H), "mlp.down_proj.weight": (H, WIDE), **NORMS},
             ["self_attn.o_proj.weight", "mlp.down_proj.weight"]),
    "gemma2": ({**LLAMA, "pre_feedforward_layernorm.weight": (H,),
                "post_feedforward_layernorm.weight": (H,)},
               ["self_attn.o_proj.weight", "mlp.down_proj.weight"]),
    "gpt2": (GPT2, [f"{m}.c_proj.{k}" for m in ("attn", "mlp") for k in ("weight", "bias")]),
    "gpt_neox": (NEOX, [f"{m}.{k}" for m in ("attention.dense", "mlp.dense_4h_to_h")
                        for k in ("weight", "bias")]),
    "opt": (OPT, [f"{m}.{k}" for m in ("self_attn.out_proj", "fc2") for k in ("weight", "bias")]),
    "falcon": (FALCON, ["self_attention.dense.weight", "mlp.dense_4h_to_h.weight"]),
    "mpt": (MPT, ["attn.out_proj.weight", "ffn.down_proj.weight"]),
    "mamba": (MAMBA, ["mixer.out_proj.weight"]),
    "mixtral": ({**ATTENTION, **NORMS, "block_sparse_moe.gate.weight": (2, H),
                 **experts("block_sparse_moe.experts", "w2", ("w1", "w3"))},
                ["self_attn.o_proj.weight", *(f"block_sparse_moe.experts.{i}.w2.weight"
                                              for i in range(2))]),
    "qwen2_moe": ({**ATTENTION, **NORMS, **SHARED, "mlp.gate.weight": (2, H),
                   "mlp.shared_expert_gate.weight": (1, H),
                   **experts("mlp.experts", "down_proj", ("gate_proj", "up_proj"))},
                  ["self_attn.o_proj.weight", "mlp.shared_expert.down_proj.weight",
                   *(f"mlp.experts.{i}.down_proj.weight" for i in range(2))]),
    "fused": ({**ATTENTION, **NORMS, "mlp.experts.gate_up_proj": (2, H, 2 * WIDE),
               "mlp.experts.gate_up_proj_bias": (2, 2 * WIDE), "mlp.router.weight": (2, H),
               "mlp.router.bias": (2,), "self_attn.sinks": (2,),
               "mlp.experts.down_proj": (2, WIDE, H), "mlp.experts.down_proj_bias": (2, H)},
              ["self_attn.o_proj.weight", "mlp.experts.down_proj", "mlp.experts.down_proj_bias"]),
    "deepseek": ({"self_attn.q_a_proj.weight": (2, H), "self_attn.q_a_layernorm.weight": (2,),
                  "self_attn.q_b_proj.weight": (H, 2), "self_attn.kv_b_proj.weight": (H, 2),
                  "self_attn.kv_a_proj_with_mqa.weight": (2, H), "self_attn.o_proj.weight": (H, H),
                  "mlp.gate.e_score_correction_bias": (2,), **MLP, **NORMS},
                 ["self_attn.o_proj.weight", "mlp.down_proj.weight"]),
    "gated delta net": ({**GATED, **MLP, **NORMS},
                        ["linear_attn.out_proj.weight", "mlp.down_proj.weight"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_outputs_of_attention_and_of_mlps_are_found_with_their_biases(kind):
    layer, wanted = CASES[kind]
    assert output_projections(layer, {"model_type": kind}) == frozenset(wanted)


@pytest.mark.parametrize("kind", ["llama", "phi3", "mixtral", "mamba", "falcon", "fused"])
def test_names_that_mean_one_thing_need_no_config(kind):
    layer, wanted = CASES[kind]
    assert output_projections(layer, None) == frozenset(wanted)


BERT = {
    "attention.self.query.weight": (H, H),
    "attention.output.dense.weight": (H, H),
    "attention.output.LayerNorm.weight": (H,),
    "intermediate.dense.weight": (WIDE, H),
    "output.dense.weight": (H, WIDE),
    "output.LayerNorm.weight": (H,),
}

REFUSED = [
    (BERT, {"model_type": "bert"}, "attention.output.LayerNorm.weight stands on the stream"),
    (OPT, {"model_type": "opt", "do_layer_norm_before": False}, "do_layer_norm_before is false"),
    (OPT, {"model_type": "bart"}, "model_type 'bart' is none of those known"),
    (OPT, None, "no config tells"),
    (GPT2, {"model_type": "openai-gpt"}, "openai-gpt puts norms on the stream itself"),
    (GPT2, None, "layers with ln_1 may have no way past their norms, and no config tells"),
    (NEOX, {"model_type": "chatglm"}, "model_type 'chatglm' is none of those known"),
    (FALCON, {"apply_residual_connection_post_layernorm": True}, "goes on behind a norm"),
    (CASES["mixtral"][0], {"model_type": "minimax"}, "minimax puts norms on the stream"),
    (LLAMA, {"scale_depth": 1.4}, "scale_depth is 1.4 in config.json"),
    (LLAMA, {"num_kv_shared_layers": 2}, "num_kv_shared_layers is 2"),
    ({**LLAMA, "layer_scalar": (1,)}, None, "knows what layer_scalar does to the stream"),
    ({**LLAMA, "mlp.side.weight": (H, H)}, None, "knows what mlp.side.weight does to the stream"),
    ({**LLAMA, "altup.down_proj.weight": (H, H)}, None, "knows what altup.down_proj.weight does"),
    ({**LLAMA, "": (H, H)}, None, "the tensor that is a layer of its own"),
    ({"w": (H, H)}, None, "knows what w does to the stream"),
    (NORMS, None, "it has no output projection of a known name"),
    ({k: v for k, v in LLAMA.items() if "o_proj" not in k}, None,
     "self_attn has no output projection of a known name beside self_attn.k_proj"),
    ({k: v for k, v in LLAMA.items() if "down_proj" not in k}, None,
     "mlp has no output projection of a known name beside mlp.gate_proj"),
    ({**LLAMA, "mlp.down_proj.weight": (WIDE, H)}, None, "do not end in one width"),
    ({**NEOX, "attention.dense_bias": (H,)}, {"model_type": "gpt_neox"}, "attention.dense_bias"),
    ({**LLAMA, "mlp.down_proj.weight_scale": (1,)}, None, "mlp.down_proj.weight_scale"),
    ({**CASES["gemma2"][0], **biases("post_feedforward_layernorm")}, None,
     "post_feedforward_layernorm has a bias, which stays"),
    ({**CASES["gemma2"][0], **biases("post_attention_layernorm")}, None,
     "post_attention_layernorm has a bias, which stays"),
    ({**ATTENTION, **MLP, "post_attention_layernorm.weight": (H,),
      **biases("post_attention_layernorm")}, None, "post_attention_layernorm has a bias"),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "config", "says"), REFUSED)
def test_what_would_be_no_identity_is_refused_by_its_name(layer, config, says):
    with pytest.raises(PlanError) as caught:
        output_projections(layer, config)
    assert says in str(caught.value)
    assert caught.value.hint


def test_a_norm_before_a_branch_may_have_a_bias():
    names = ("input_layernorm", "post_attention_layernorm")
    assert output_projections({**LLAMA, **biases(*names)}, None) == frozenset(CASES["llama"][1])


def test_unknown_names_come_with_those_that_are_known():
    with pytest.raises(PlanError) as caught:
        output_projections({"w": (H, H)}, None)
    assert "named as those of Llama, Mistral, Qwen" in caught.value.hint


@pytest.mark.parametrize("kind", [["llama"], {"llama": 1}, 4, None, True])
def test_a_model_type_of_another_json_type_is_that_of_no_known_class(kind):
    assert output_projections(LLAMA, {"model_type": kind}) == output_projections(LLAMA, {})
