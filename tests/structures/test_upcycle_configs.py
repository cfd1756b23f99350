"""The config of an upcycled model says what the dense one's says, for what both classes read."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import transformers

from merge_kit.architecture.experts import LAYOUTS
from merge_kit.architecture.experts_config import (
    DEFAULTS,
    DENSE_ONLY,
    Sparsity,
    config_problem,
    sparse_config,
)
from merge_kit.architecture.experts_windows import version_notes

PAIRS = [(kind, name) for name, layout in LAYOUTS.items() for kind in layout.sources]
CLASSES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "mixtral": transformers.MixtralConfig,
    "qwen2_moe": transformers.Qwen2MoeConfig,
    "qwen3_moe": transformers.Qwen3MoeConfig,
}
SPARSITY = Sparsity(
    experts=4, top_k=2, expert_width=40, shared_width=48, layers=3, dense_layers=(1,)
)
SPARSE = {
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "qkv_bias",
}
"""What only mixtures have; `router_jitter_noise` 0 and `qkv_bias` true are right as they are."""


def defaults(kind):
    known = {field.name: field.default for field in fields(CLASSES[kind])}
    return {**known, "rope_theta": CLASSES[kind].default_theta}


def converted(kind, name, values, text=None):
    text = text or json.dumps({"model_type": kind, "num_hidden_layers": 3, **values}, indent=2)
    return sparse_config(text, LAYOUTS[name], SPARSITY)


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_a_default_that_differs_is_written(kind, name):
    before, after = defaults(kind), defaults(name)
    made = json.loads(converted(kind, name, {}))
    written_anew = {"intermediate_size"} if name == "mixtral" else set()
    for key in before.keys() & after.keys() - {"model_type", "num_hidden_layers"} - written_anew:
        if repr(before[key]) != repr(after[key]):
            wanted = before[key]
            if key == "num_key_value_heads" and wanted is None:
                wanted = before["num_attention_heads"]
            assert made[key] == wanted, key
    assert DEFAULTS[kind].keys() <= before.keys()
    for key, value in DEFAULTS[kind].items():
        assert before[key] == value, key


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_every_key_of_the_dense_class_is_known_to_the_sparse_one_or_thought_of(kind, name):
    ours = {"attention_bias", "head_dim", "max_window_layers", "layer_types"}
    unknown = defaults(kind).keys() - defaults(name).keys() - set(DENSE_ONLY)
    assert unknown <= ours
    anew = defaults(name).keys() - defaults(kind).keys() - SPARSE
    assert anew <= {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_what_is_not_changed_stays_as_it_is_written(kind, name):
    text = (
        f'{{\n    "model_type": "{kind}", "custom" : {{"a":1}},\n\t"num_attention_heads": 4,\n'
        '"rms_norm_eps": 0.00001, "num_hidden_layers": 3\n}\n'
    )
    made = converted(kind, name, {}, text)
    assert '"custom" : {"a":1},\n\t"num_attention_heads": 4,\n"rms_norm_eps": 0.00001' in made
    assert json.loads(made)["model_type"] == name


def test_the_keys_of_a_mixture_are_written():
    made = json.loads(converted("qwen2", "qwen2_moe", {"architectures": ["Qwen2ForCausalLM"]}))
    assert made["architectures"] == ["Qwen2MoeForCausalLM"]
    assert made["num_experts"] == 4
    assert made["num_experts_per_tok"] == 2
    assert made["moe_intermediate_size"] == 40
    assert made["shared_expert_intermediate_size"] == 48
    assert made["norm_topk_prob"] is True
    assert made["decoder_sparse_step"] == 1
    assert made["mlp_only_layers"] == [1]
    assert made["output_router_logits"] is False
    mixtral = json.loads(
        converted("llama", "mixtral", {"intermediate_size": 11, "mlp_bias": False})
    )
    assert mixtral["num_local_experts"] == 4
    assert mixtral["intermediate_size"] == 40
    assert mixtral["sliding_window"] is None
    assert "mlp_bias" not in mixtral


@pytest.mark.parametrize("ending", ["ForCausalLM", "ForSequenceClassification", "Model"])
def test_the_class_keeps_what_it_is_for(ending):
    made = converted("llama", "mixtral", {"architectures": [f"Llama{ending}"]})
    assert json.loads(made)["architectures"] == [f"Mixtral{ending}"]
    assert hasattr(transformers, f"Mixtral{ending}")


def test_theta_is_written_only_where_nothing_says_it():
    for held in ({"rope_theta": 5.0}, {"rope_parameters": {"rope_theta": 5.0}}):
        made = json.loads(converted("llama", "mixtral", held))
        assert {key: made[key] for key in held} == held
        assert ("rope_theta" in made) == ("rope_theta" in held)
    scaled = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert json.loads(converted("llama", "mixtral", scaled))["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    ("values", "kinds"),
    [
        ({}, ["full_attention"] * 3),
        ({"use_sliding_window": True, "max_window_layers": 28}, ["full_attention"] * 3),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            ["full_attention", "sliding_attention", "sliding_attention"],
        ),
    ],
)
def test_layers_of_a_qwen2_keep_their_windows(values, kinds):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    made = json.loads(converted("qwen2", "qwen2_moe", {**sizes, **values}))
    dense = transformers.Qwen2Config(num_hidden_layers=3, **sizes, **values)
    sparse = transformers.Qwen2MoeConfig.from_dict(made)
    assert dense.layer_types == sparse.layer_types == kinds
    assert (dense.sliding_window or 0) == sparse.sliding_window


@pytest.mark.parametrize(
    ("kind", "name", "values", "problem"),
    [
        ("llama", "mixtral", {"mlp_bias": True}, "mlp_bias is true"),
        ("llama", "qwen2_moe", {"attention_bias": True}, "attention_bias is true"),
        ("llama", "mixtral", {"architectures": ["LlamaForRanking"]}, "class LlamaForRanking"),
        (
            "qwen3",
            "qwen3_moe",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            "sliding window",
        ),
        ("qwen2", "qwen2_moe", {"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        (
            "qwen3",
            "qwen3_moe",
            {"use_sliding_window": True, "max_window_layers": "x"},
            "max_window_layers is 'x'",
        ),
        ("qwen3", "qwen3_moe", {"attention_bias": True, "use_sliding_window": True}, ""),
        ("llama", "mixtral", {"mlp_bias": False, "attention_bias": False}, ""),
    ],
)
def test_what_the_layout_cannot_say_is_named(kind, name, values, problem):
    found = config_problem({"model_type": kind, **values}, LAYOUTS[name], 3)
    assert problem in found
    assert bool(problem) == bool(found)


def test_what_version_4_of_transformers_does_not_read_is_noted():
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    (note,) = version_notes(converted("qwen2", "qwen2_moe", windows), 3)
    assert "layer_types" in note
    heads = {"head_dim": 16, "num_attention_heads": 4, "hidden_size": 32, "sliding_window": 4}
    (note,) = version_notes(converted("mistral", "qwen2_moe", heads), 3)
    assert "head_dim is 16 for 4 heads in a width of 32" in note
    assert not list(version_notes(converted("mistral", "mixtral", heads), 3))
    assert not list(version_notes(converted("qwen2", "qwen2_moe", {}), 3))
