"""Layer stacks are found from names, and the one that config.json describes among them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_architectures import MAKERS, config_text, names

from merge_kit.architecture.stacks import (
    Stack,
    described_stack,
    find_stacks,
    first_layer_extras,
    first_layer_lacks,
    layer_name,
    split_layer,
)


@pytest.mark.parametrize(
    ("name", "prefix", "layer", "suffix"),
    [
        ("model.layers.3.mlp.experts.7.w1.weight", "model.layers", 3, "mlp.experts.7.w1.weight"),
        (
            "encoder.layers.0.blocks.1.attn.qkv.weight",
            "encoder.layers",
            0,
            "blocks.1.attn.qkv.weight",
        ),
        ("encoder.block.0.layer.1.DenseReluDense.wi.weight", "encoder.block", 0, None),
        ("h.0.attn.bias", "h", 0, "attn.bias"),
        ("transformer.h.11.ln_1.weight", "transformer.h", 11, "ln_1.weight"),
        ("vit.encoder.layer.0.output.dense.bias", "vit.encoder.layer", 0, "output.dense.bias"),
        ("down_blocks.0.resnets.1.conv1.weight", "down_blocks", 0, "resnets.1.conv1.weight"),
        ("unet/down_blocks.2.resnets.1.conv1.weight", "unet/down_blocks", 2, None),
        ("v1.5/mlp.0.weight", "v1.5/mlp", 0, "weight"),
        ("mlp.0.weight", "mlp", 0, "weight"),
        ("0.weight", "", 0, "weight"),
        ("unet/2.weight", "unet/", 2, "weight"),
        ("scales.4", "scales", 4, ""),
    ],
)
def test_the_outermost_number_is_the_layer(name, prefix, layer, suffix):
    (stack,) = find_stacks([name])
    assert (stack.prefix, stack.layers) == (prefix, (layer,))
    found = split_layer(name, stack)
    assert found is not None
    assert found[0] == layer
    assert suffix is None or found[1] == suffix
    assert layer_name(stack, *found) == name


def test_names_without_a_number_are_loose():
    assert find_stacks(["model.norm.weight", "conv1.weight", "layers.01.w", "layers.-1.w"]) == ()


def test_holes_count_and_layers_are_told_apart():
    assert find_stacks(["mlp.0.weight", "mlp.2.weight"]) == (Stack("mlp", 3, (0, 2)),)


def test_a_prefix_that_begins_like_another_is_no_part_of_it():
    stack = Stack("model.layers", 1, (0,))
    assert split_layer("model.layers_extra.0.w", stack) is None
    assert split_layer("model.layers.norm.w", stack) is None


@given(st.lists(st.sampled_from(["model", "h", "0", "7", "12", "weight", "007"]), min_size=1))
def test_split_and_join_are_inverse(parts):
    name = ".".join(parts)
    for stack in find_stacks([name]):
        found = split_layer(name, stack)
        assert found is not None
        assert layer_name(stack, *found) == name


@pytest.mark.parametrize(
    ("kind", "prefix", "count"),
    [
        ("llama", "model.layers", 5),
        ("qwen3", "model.layers", 4),
        ("gemma3_text", "model.layers", 7),
        ("gemma3", "language_model.model.layers", 7),
        ("gpt2", "transformer.h", 4),
        ("mixtral", "model.layers", 4),
        ("whisper", "model.decoder.layers", 2),
        ("t5", "decoder.block", 4),
        ("vit", "vit.encoder.layer", 4),
        ("llava", "language_model.model.layers", 5),
    ],
)
def test_the_described_stack_of_a_saved_model(kind, prefix, count):
    found = described_stack(json.loads(config_text(kind)), find_stacks(names(kind)))
    assert found == Stack(prefix, count, tuple(range(count)))


def test_every_tiny_model_is_looked_at():
    assert len(MAKERS) == 10


def stacks(*prefixes: tuple[str, int]) -> tuple[Stack, ...]:
    return tuple(Stack(prefix, count, tuple(range(count))) for prefix, count in prefixes)


def test_without_a_config_the_only_stack_is_described():
    one = stacks(("blocks", 3))
    assert described_stack(None, one) == one[0]
    assert described_stack(None, stacks(("a", 3), ("b", 3))) is None
    assert described_stack(None, ()) is None


def test_a_unet_describes_no_stack():
    found = stacks(("down_blocks", 4), ("up_blocks", 4))
    assert (
        described_stack({"_class_name": "UNet2DConditionModel", "layers_per_block": 2}, found)
        is None
    )


def test_multi_token_prediction_in_a_stack_of_its_own_is_not_the_described_one():
    found = stacks(("mtp.layers", 1), ("model.layers", 4))
    described = described_stack({"model_type": "qwen3_next", "num_hidden_layers": 4}, found)
    assert described == found[1]


def test_the_stack_with_the_configs_count_is_taken():
    found = stacks(("single_transformer_blocks", 38), ("transformer_blocks", 19))
    assert described_stack({"num_layers": 19, "num_single_layers": 38}, found) == found[1]


def test_a_text_config_that_leaves_its_count_out_still_describes_the_text_stack():
    config = {
        "model_type": "llava",
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", "num_hidden_layers": 24},
    }
    found = stacks(("language_model.model.layers", 32), ("vision_tower.encoder.layers", 24))
    assert described_stack(config, found) == found[0]


def test_a_text_count_at_the_top_is_not_mistaken_for_the_vision_towers():
    config = {"model_type": "qwen2_vl", "num_hidden_layers": 28, "vision_config": {"depth": 32}}
    found = stacks(("model.layers", 28), ("visual.blocks", 32))
    assert described_stack(config, found) == found[0]


def test_the_thinker_is_found_in_nested_configs():
    config = {
        "thinker_config": {
            "model_type": "thinker",
            "text_config": {"num_hidden_layers": 6},
            "audio_config": {"encoder_layers": 4},
            "vision_config": {"depth": 6},
        },
        "talker_config": {"model_type": "talker", "num_hidden_layers": 3},
    }
    found = stacks(
        ("talker.model.layers", 3),
        ("thinker.audio_tower.layers", 4),
        ("thinker.model.layers", 6),
        ("thinker.visual.blocks", 6),
    )
    assert described_stack(config, found) == found[2]


@pytest.mark.parametrize(
    ("layers", "extras"),
    [
        ({0: "qkb", 1: "qk", 2: "qk"}, "b"),  # the table of positions in T5
        ({0: "qk", 1: "qk"}, ""),
        ({0: "qd", 1: "qe", 2: "qe"}, ""),  # a dense layer before those with experts
        ({0: "qkb", 1: "qkb", 2: "qk"}, ""),
        ({0: "qkb", 1: "qk", 2: "q"}, ""),
        ({0: "qk", 1: "qkn"}, ""),
        ({0: "qk"}, ""),
        ({}, ""),
    ],
)
def test_what_only_the_first_of_equal_layers_has_belongs_to_all_of_them(layers, extras):
    assert first_layer_extras(layers) == set(extras)


@pytest.mark.parametrize(
    ("layers", "lacks"),
    [
        ({0: "qk", 1: "nqk", 2: "nqk"}, "n"),  # no norm behind the embeddings of ModernBERT
        ({0: "qk", 1: "nqk"}, ""),
        ({0: "qd", 1: "qe", 2: "qe"}, ""),
        ({0: "qk", 1: "nqk", 2: "qk"}, ""),
        ({0: "nqk", 1: "qk", 2: "qk"}, ""),
        ({1: "qk", 2: "qk"}, ""),
    ],
)
def test_what_every_layer_has_but_the_first_is_found(layers, lacks):
    assert first_layer_lacks(layers) == set(lacks)
