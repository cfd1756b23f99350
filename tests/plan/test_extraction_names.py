"""Which tensors are factored, and what programs call the modules of files."""

from __future__ import annotations

import pytest

from merge_kit.architecture.turned import is_turned
from merge_kit.core.tensors import TensorSpec
from merge_kit.plan.extracting.names import (
    factored_kind,
    is_expert,
    naming,
    short_targets,
    task_type,
)


def config(architecture, kind="llama"):
    return {"architectures": [architecture], "model_type": kind}


@pytest.mark.parametrize(
    ("settings", "name", "module"),
    [
        (config("LlamaForCausalLM"), "model.layers.0.up.weight", "model.layers.0.up"),
        (config("LlamaForCausalLM"), "layers.0.up.weight", "model.layers.0.up"),
        (config("LlamaModel"), "layers.0.up.weight", "layers.0.up"),
        (None, "layers.0.up.weight", "layers.0.up"),
        (config("GPT2LMHeadModel", "gpt2"), "h.0.ln_1.bias", "transformer.h.0.ln_1"),
        (config("GPT2LMHeadModel", "gpt2"), "lm_head.weight", "lm_head"),
        (config("GPT2Model", "gpt2"), "h.0.ln_1.bias", "h.0.ln_1"),
        (config("GPTNeoXForCausalLM", "gpt_neox"), "layers.0.x.weight", "gpt_neox.layers.0.x"),
        (config("BertForMaskedLM", "bert"), "encoder.layer.0.x.weight", "bert.encoder.layer.0.x"),
        (
            config("T5ForConditionalGeneration", "t5"),
            "encoder.block.0.x.weight",
            "encoder.block.0.x",
        ),
        (
            config("OPTForCausalLM", "opt"),
            "decoder.layers.0.fc1.weight",
            "model.decoder.layers.0.fc1",
        ),
        (
            config("LlavaForConditionalGeneration", "llava"),
            "language_model.model.layers.0.up.weight",
            "model.language_model.layers.0.up",
        ),
        (
            config("Qwen2VLForConditionalGeneration", "qwen2_vl"),
            "model.layers.0.up.weight",
            "model.layers.0.up",  # no visual beside it
        ),
    ],
)
def test_the_module_of_a_tensor(settings, name, module):
    assert naming(settings, [name]).module(name) == module


def test_modules_of_a_model_with_pictures_have_the_names_of_today():
    names = naming(
        config("Qwen2VLForConditionalGeneration", "qwen2_vl"),
        ["visual.blocks.0.x.weight", "model.layers.0.up.weight", "lm_head.weight"],
    )
    assert names.module("visual.blocks.0.x.weight") == "model.visual.blocks.0.x"
    assert names.module("model.layers.0.up.weight") == "model.language_model.layers.0.up"
    assert names.module("lm_head.weight") == "lm_head"


def test_names_that_have_the_prefix_are_left_alone():
    names = ["transformer.h.0.ln_1.bias", "lm_head.weight"]
    found = naming(config("GPT2LMHeadModel", "gpt2"), names)
    assert [found.module(name) for name in names] == ["transformer.h.0.ln_1", "lm_head"]


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (4, 6), "linear"),
        ("h.0.attn.c_attn.weight", (4, 12), "linear"),
        ("down_blocks.0.conv1.weight", (4, 3, 3, 3), "convolution"),
        ("model.audio.conv.weight", (4, 3, 5), "convolution"),
        ("mixer.conv1d.weight", (4, 1, 3), None),  # depthwise
        ("model.embed_tokens.weight", (9, 4), None),
        ("transformer.wpe.weight", (9, 4), None),
        ("shared.weight", (9, 4), None),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (9, 4), None),
        ("lm_head.weight", (9, 4), None),
        ("model.layers.0.mlp.gate.weight", (8, 4), None),
        ("model.layers.0.mlp.gate_proj.weight", (8, 4), "linear"),
        ("model.norm.weight", (4,), None),
        ("model.layers.0.self_attn.q_proj.bias", (4,), None),
        ("mixer.A_log", (4, 6), None),
        ("experts.gate_up_proj", (3, 4, 6), None),
        ("empty.weight", (0, 6), None),
    ],
)
def test_what_is_factored(name, shape, kind):
    assert factored_kind(name, TensorSpec(name, "BF16", shape)) == kind


def test_integers_are_not_factored():
    assert factored_kind("a.up.weight", TensorSpec("a.up.weight", "I8", (4, 6))) is None


def test_gpt2_stores_some_weights_inputs_first():
    assert is_turned(config("GPT2LMHeadModel", "gpt2"), "transformer.h.0.mlp.c_fc")
    assert not is_turned(config("GPT2LMHeadModel", "gpt2"), "lm_head")
    assert not is_turned(config("LlamaForCausalLM"), "model.layers.0.mlp.c_fc")


def test_experts_that_are_stored_apart():
    assert is_expert("model.layers.0.mlp.experts.11.up_proj")
    assert not is_expert("model.layers.0.mlp.experts")
    assert not is_expert("model.layers.0.mlp.shared_experts.up_proj")


def test_short_targets_choose_no_other_module():
    modules = ["a.0.q", "a.1.q", "a.0.k", "a.1.k", "norm"]
    assert short_targets(["a.0.q", "a.1.q"], modules) == ["q"]
    assert short_targets(["a.0.q"], modules) == ["a.0.q"]


@pytest.mark.parametrize(
    ("chosen", "others", "targets"),
    [
        (["v.mlp.0", "v.mlp.2"], ["v.blocks.0.norm"], ["v.mlp.0", "v.mlp.2"]),
        (["v.mlp.0", "v.blocks.0.q"], [], ["q", "v.mlp.0"]),
        (["0"], ["norm"], ["0"]),
        (["0"], ["blocks.0.norm"], None),  # "blocks.0" ends with it
        (["a.out", "b.0.out"], ["a.out.norm"], ["a.out", "b.0.out"]),
        (["mlp.0"], ["blocks.mlp.0.norm"], None),
    ],
)
def test_targets_are_whole_where_a_number_or_a_container_ends_alike(chosen, others, targets):
    assert short_targets(chosen, [*chosen, *others]) == targets


def test_the_head_of_gpt_neox_is_named_as_programs_name_it():
    names = ["gpt_neox.layers.0.mlp.dense_h_to_4h.weight", "embed_out.weight"]
    found = naming(config("GPTNeoXForCausalLM", "gpt_neox"), names)
    assert [found.module(name) for name in names] == [
        "gpt_neox.layers.0.mlp.dense_h_to_4h",
        "lm_head",
    ]
    japanese = naming(config("GPTNeoXJapaneseForCausalLM", "gpt_neox_japanese"), names)
    assert japanese.module("embed_out.weight") == "embed_out"


def test_the_task_is_named_for_causal_models_alone():
    assert task_type(config("LlamaForCausalLM")) == "CAUSAL_LM"
    assert task_type(config("GPT2LMHeadModel")) == "CAUSAL_LM"
    assert task_type(config("ViTForImageClassification")) is None
    assert task_type(None) is None
