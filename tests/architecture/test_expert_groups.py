"""Experts are found by names and shapes: split and fused, with routers and shared experts."""

from __future__ import annotations

import json

import pytest

from merge_kit.architecture.dense_twins import (
    dense_block,
    dense_config,
    projections,
    twin_for,
)
from merge_kit.architecture.expert_groups import Piece, find_experts
from merge_kit.errors import MismatchError, PlanError

HIDDEN, WIDTH, EXPERTS = 8, 6, 4


def split(block: str, names: tuple[str, ...], experts: int = EXPERTS) -> dict[str, tuple]:
    return {f"{block}.{e}.{name}": (WIDTH, HIDDEN) for e in range(experts) for name in names}


def one(shapes: dict[str, tuple]):
    (group,) = find_experts(shapes)
    return group


def test_experts_of_mixtral_have_tensors_of_their_own():
    block = "model.layers.3.block_sparse_moe"
    shapes = {
        f"{block}.gate.weight": (EXPERTS, HIDDEN),
        **split(f"{block}.experts", ("w1.weight", "w2.weight", "w3.weight")),
        "model.layers.3.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    }
    group = one(shapes)
    assert (group.path, group.block, group.layer) == (f"{block}.experts", block, 3)
    assert (group.layout, group.count, group.problem) == ("split", EXPERTS, "")
    assert set(group.parts) == {"w1.weight", "w2.weight", "w3.weight"}
    assert group.parts["w2.weight"][3] == Piece(f"{block}.experts.3.w2.weight", 0, (WIDTH, HIDDEN))
    assert group.rows == (f"{block}.gate.weight",)
    assert group.shared == ()


@pytest.mark.parametrize(
    ("block", "rows", "shared"),
    [
        (
            "model.layers.0.mlp",
            {"gate.weight": (EXPERTS, HIDDEN)},
            {"shared_expert.up_proj.weight": (EXPERTS, 8), "shared_expert_gate.weight": (1, 8)},
        ),
        (
            "model.layers.0.mlp",
            {"gate.weight": (EXPERTS, HIDDEN), "gate.e_score_correction_bias": (EXPERTS,)},
            {"shared_experts.down_proj.weight": (EXPERTS, HIDDEN)},
        ),
        ("model.layers.0.mlp", {"gate.weight": (EXPERTS, HIDDEN)}, {}),
        (
            "model.layers.0.block_sparse_moe",
            {"gate.weight": (EXPERTS, HIDDEN), "e_score_correction_bias": (EXPERTS,)},
            {},
        ),
        ("language_model.model.layers.0.ffn", {"router.weight": (EXPERTS, 8)}, {}),
    ],
    ids=["qwen2_moe", "deepseek", "olmoe", "minimax", "another"],
)
def test_what_has_a_row_for_each_expert_follows_them(block, rows, shared):
    rest = {f"{block}.{name}": shape for name, shape in {**rows, **shared}.items()}
    names = ("gate_proj.weight", "up_proj.weight", "up_proj.bias")
    group = one({**rest, **split(f"{block}.experts", names)})
    assert set(group.rows) == {f"{block}.{name}" for name in rows}
    assert set(group.shared) == {f"{block}.{name}" for name in shared}
    assert set(group.parts) == set(names)


def test_experts_of_gpt_oss_share_tensors_with_their_biases():
    block = "model.layers.1.mlp"
    shapes = {
        f"{block}.experts.gate_up_proj": (EXPERTS, HIDDEN, 2 * WIDTH),
        f"{block}.experts.gate_up_proj_bias": (EXPERTS, 2 * WIDTH),
        f"{block}.experts.down_proj": (EXPERTS, WIDTH, HIDDEN),
        f"{block}.experts.down_proj_bias": (EXPERTS, HIDDEN),
        f"{block}.router.weight": (EXPERTS, HIDDEN),
        f"{block}.router.bias": (EXPERTS,),
    }
    group = one(shapes)
    assert (group.layout, group.count, group.layer) == ("fused", EXPERTS, 1)
    assert set(group.rows) == {f"{block}.router.weight", f"{block}.router.bias"}
    assert group.parts["gate_up_proj_bias"][2] == Piece(
        f"{block}.experts.gate_up_proj_bias", 2 * 2 * WIDTH, (2 * WIDTH,)
    )
    assert group.tensors == tuple(name for name in shapes if "experts" in name)


@pytest.mark.parametrize(
    ("names", "path"),
    [
        (("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"), "feed_forward"),
        (("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"), ""),
    ],
    ids=["llama4", "granitemoe"],
)
def test_fused_experts_lie_under_several_names(names, path):
    shapes = {f"model.layers.0.{name}": (EXPERTS, WIDTH, HIDDEN) for name in names}
    router = f"model.layers.0.{path or 'block_sparse_moe'}.router.layer.weight"
    group = one({**shapes, router: (EXPERTS, HIDDEN)})
    assert (group.layout, group.count) == ("fused", EXPERTS)
    assert group.tensors == tuple(shapes)
    assert group.rows == (router,)


def test_a_dense_model_has_none():
    assert (
        find_experts({"model.layers.0.mlp.up_proj.weight": (4, 4), "lm_head.weight": (9, 4)}) == ()
    )


def test_groups_come_by_layer_and_dense_layers_have_none():
    shapes = {"model.layers.0.mlp.up_proj.weight": (WIDTH, HIDDEN)}
    for layer in (1, 2):
        block = f"model.layers.{layer}.mlp"
        shapes |= split(f"{block}.experts", ("up_proj.weight",))
        shapes[f"{block}.gate.weight"] = (EXPERTS, HIDDEN)
    assert [group.layer for group in find_experts(shapes)] == [1, 2]


def test_a_missing_tensor_of_an_expert_is_named():
    shapes = split("model.layers.0.mlp.experts", ("up_proj.weight", "down_proj.weight"))
    del shapes["model.layers.0.mlp.experts.2.down_proj.weight"]
    assert one(shapes).problem == "expert 2 of 4 has no down_proj.weight"


def test_experts_of_two_shapes_are_named():
    shapes = split("model.layers.0.mlp.experts", ("up_proj.weight",))
    shapes["model.layers.0.mlp.experts.1.up_proj.weight"] = (WIDTH + 1, HIDDEN)
    assert "experts.0.up_proj.weight has shape [6, 8]" in one(shapes).problem
    assert "experts.1.up_proj.weight [7, 8]" in one(shapes).problem


def test_fused_tensors_of_different_counts_are_named():
    shapes = {"l.0.mlp.experts.gate_up_proj": (4, 12, 8), "l.0.mlp.experts.down_proj": (3, 8, 6)}
    problem = one(shapes).problem
    assert problem == "l.0.mlp.experts.gate_up_proj holds 4 experts, l.0.mlp.experts.down_proj 3"


def test_fused_gates_come_before_ups():
    path = "model.layers.0.mlp.experts"
    made = projections(
        one(
            {
                f"{path}.gate_up_proj": (2, 2 * WIDTH, HIDDEN),
                f"{path}.down_proj": (2, HIDDEN, WIDTH),
            }
        )
    )
    each = 2 * WIDTH * HIDDEN
    assert [piece.start for piece in made["gate_proj"]] == [0, each]
    assert [piece.start for piece in made["up_proj"]] == [WIDTH * HIDDEN, each + WIDTH * HIDDEN]
    assert made["down_proj"][1].start == HIDDEN * WIDTH
    assert made["up_proj"][0].shape == (WIDTH, HIDDEN)


def test_mixtral_spells_gate_up_and_down_as_w1_w3_and_w2():
    shapes = split(
        "model.layers.0.block_sparse_moe.experts", ("w1.weight", "w2.weight", "w3.weight")
    )
    for e in range(EXPERTS):
        shapes[f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight"] = (HIDDEN, WIDTH)
    group = one(shapes)
    made = projections(group)
    assert made["gate_proj"][1].tensor.endswith("experts.1.w1.weight")
    assert made["up_proj"][1].tensor.endswith("experts.1.w3.weight")
    assert made["down_proj"][1].tensor.endswith("experts.1.w2.weight")
    assert dense_block(group) == "model.layers.0.mlp"


@pytest.mark.parametrize(
    "shapes",
    [
        {"gate_up_proj": (2, HIDDEN, 2 * WIDTH), "down_proj": (2, WIDTH, HIDDEN)},
        {"gate_up_proj": (2, 12, 8), "down_proj": (2, 8, 6), "down_proj_bias": (2, 8)},
    ],
    ids=["transposed", "with a bias"],
)
def test_experts_that_are_no_such_mlp_are_refused(shapes):
    group = one({f"model.layers.0.mlp.experts.{name}": shape for name, shape in shapes.items()})
    with pytest.raises(MismatchError, match=r"experts hold .*; a dense MLP is made of gate_proj"):
        projections(group)


def test_a_class_without_a_dense_twin_is_told_what_is_known():
    with pytest.raises(PlanError, match="no dense class is known for model_type 'olmoe'") as caught:
        twin_for({"model_type": "olmoe"}, None)
    assert "mixtral (mistral or llama), qwen2_moe (qwen2), qwen3_moe (qwen3)" in str(caught.value)


def test_an_architecture_of_other_layers_is_refused():
    with pytest.raises(PlanError, match="layers of mixtral are those of mistral or llama"):
        twin_for({"model_type": "mixtral"}, "qwen2")


def test_without_a_config_the_class_must_be_named():
    with pytest.raises(PlanError, match=r"no config\.json"):
        twin_for(None, None)
    assert twin_for(None, "llama").dense[0] == "llama"


def test_only_what_changes_is_changed_in_a_config():
    text = """{
  "architectures": ["MixtralForCausalLM"],
  "model_type":   "mixtral",
  "rms_norm_eps": 1e-05, "odd key": [1,2],
  "num_local_experts": 8,
  "num_experts_per_tok": 2,
  "rope_theta": 5e5,
  "sliding_window": 7,
  "intermediate_size": 14336
}
"""
    made = dense_config(text, twin_for({"model_type": "mixtral"}, None), 14336)
    assert (
        made
        == """{
  "architectures": ["MistralForCausalLM"],
  "model_type":   "mistral",
  "rms_norm_eps": 1e-05, "odd key": [1,2],
  "rope_theta": 5e5,
  "sliding_window": 7,
  "intermediate_size": 14336
}
"""
    )


def test_a_window_that_llama_lacks_is_refused_and_null_is_removed():
    llama = twin_for({"model_type": "mixtral"}, "llama")
    with pytest.raises(PlanError, match="sliding_window is 7, and llama has none"):
        dense_config('{"model_type": "mixtral", "sliding_window": 7}', llama, 4)
    made = dense_config('{"model_type": "mixtral", "sliding_window": null}', llama, 4)
    assert "sliding_window" not in made


def test_biases_that_qwen2_wants_must_be_there():
    with pytest.raises(PlanError, match="qkv_bias is false"):
        dense_config('{"qkv_bias": false}', twin_for({"model_type": "qwen2_moe"}, None), 4)


def test_no_experts_at_all_are_named():
    group = one({"model.layers.0.mlp.experts.down_proj": (0, 8, 6)})
    assert group.problem == "model.layers.0.mlp.experts.down_proj has shape [0, 8, 6]: no experts"


@pytest.mark.parametrize("shape", [(), (6,), (6, 8, 1)])
def test_experts_that_hold_no_matrices_are_refused(shape):
    names = ("gate_proj", "up_proj", "down_proj")
    shapes = {f"model.layers.0.mlp.experts.0.{name}.weight": shape for name in names}
    with pytest.raises(MismatchError, match="a dense MLP is made of"):
        projections(one(shapes))


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("odd", ["null", '"many"', "[[1], {}]", "{}", "-1", "0", "true"])
def test_odd_values_in_a_config_are_kept(kind, odd):
    keys = ("architectures", "num_hidden_layers", "max_window_layers", "hidden_size")
    keys += ("num_attention_heads", "head_dim", "rope_parameters")
    text = "{" + ", ".join(f'"{key}": {odd}' for key in keys) + ', "use_sliding_window": true}'
    made = dense_config(text, twin_for({"model_type": kind}, None), 4)
    assert json.loads(made)["architectures"] == json.loads(odd)
