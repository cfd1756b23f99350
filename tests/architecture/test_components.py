"""Keys of `modules` cover the tensors that the dialect gives them."""

from __future__ import annotations

import pytest
from tiny_architectures import names

from merge_kit.architecture.components import component_names, component_of
from merge_kit.architecture.stacks import find_stacks

LLAVA = ("text_decoder", "vision_tower", "multi_modal_projector")
WHISPER = ("encoder", "decoder")


def of(kind: str, keys: tuple[str, ...]) -> dict[str, str | None]:
    every = names(kind)
    return {name: component_of(name, keys, find_stacks(every)) for name in every}


def test_default_is_everything_in_a_model_with_one_stack():
    assert set(of("llama", ("default",)).values()) == {"default"}


def test_default_is_what_is_loose_in_a_model_with_two_stacks():
    found = of("llava", ("default", "language_model.model.layers"))
    assert found["language_model.lm_head.weight"] == "default"
    assert found["multi_modal_projector.linear_1.weight"] == "default"
    layer = "language_model.model.layers.0.mlp.up_proj.weight"
    assert found[layer] == "language_model.model.layers"
    assert found["vision_tower.encoder.layers.0.mlp.fc1.weight"] is None


def test_the_parts_of_a_multimodal_model():
    found = of("llava", LLAVA)
    assert None not in found.values()
    assert found["language_model.lm_head.weight"] == "text_decoder"
    assert found["language_model.model.norm.weight"] == "text_decoder"
    assert found["multi_modal_projector.linear_2.bias"] == "multi_modal_projector"
    assert found["vision_tower.post_layernorm.weight"] == "vision_tower"


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("model.layers.0.mlp.up_proj.weight", "text_decoder"),
        ("lm_head.weight", "text_decoder"),
        ("visual.blocks.0.attn.qkv.weight", "vision_tower"),
        ("visual.merger.mlp.0.weight", "multi_modal_projector"),
        ("visual.deepstack_merger_list.0.norm.weight", "multi_modal_projector"),
        ("audio_tower.layers.0.fc1.weight", None),
    ],
)
def test_a_tower_by_another_name(name, component):
    stacks = find_stacks(["model.layers.0.w", "visual.blocks.0.w"])
    assert component_of(name, LLAVA, stacks) == component


def test_a_vision_model_is_a_tower_by_another_key():
    stacks = find_stacks(["language_model.model.layers.0.w", "vision_model.model.layers.0.w"])
    name = "vision_model.model.layers.0.fc1.weight"
    assert component_of(name, ("vision_model",), stacks) == "vision_model"
    assert component_of(name, ("vision_tower",), stacks) == "vision_tower"
    assert component_of(name, ("text_decoder",), stacks) is None


def test_encoder_decoder_and_shared():
    found = of("whisper", WHISPER)
    assert found["model.encoder.conv1.weight"] == "encoder"
    assert found["model.decoder.embed_tokens.weight"] == "decoder"
    stacks = find_stacks(names("t5"))
    keys = ("encoder", "decoder", "shared")
    assert component_of("shared.weight", keys, stacks) == "shared"
    assert component_of("lm_head.weight", keys, stacks) == "decoder"
    assert component_of("proj_out.weight", WHISPER, stacks) == "decoder"
    assert component_of("shared.weight", WHISPER, stacks) is None


def test_folders_of_a_pipeline():
    every = ["unet/down_blocks.0.w", "unet/conv_in.weight", "vae/encoder.conv_in.weight"]
    stacks = find_stacks(every)
    found = [component_of(name, ("unet", "default"), stacks) for name in every]
    assert found == ["unet", "unet", "default"]


def test_the_longest_key_wins():
    stacks = find_stacks(["model.layers.0.w", "vision.layers.0.w"])
    keys = ("model", "model.layers", "default")
    assert component_of("model.layers.0.w", keys, stacks) == "model.layers"
    assert component_of("model.norm.weight", keys, stacks) == "model"


def test_hints_name_what_there_is():
    assert component_names(names("llama"), find_stacks(names("llama"))) == ("default",)
    assert component_names(names("llava"), find_stacks(names("llava"))) == (
        "default",
        "language_model.model.layers",
        "vision_tower.encoder.layers",
        "multi_modal_projector",
        "text_decoder",
        "vision_tower",
    )
    found = component_names(names("t5"), find_stacks(names("t5")))
    assert found == ("default", "decoder.block", "encoder.block", "decoder", "encoder", "shared")
    every = ["unet/a.0.w", "vae/w"]
    assert component_names(every, find_stacks(every)) == ("default", "unet", "vae")


@pytest.mark.parametrize("kind", ["llama", "llava", "t5", "whisper", "gemma3"])
def test_every_hinted_key_covers_something(kind):
    stacks = find_stacks(names(kind))
    for key in component_names(names(kind), stacks):
        covered = [component_of(name, (key,), stacks) for name in names(kind)]
        assert key in covered or (key == "default" and len(stacks) > 1)
