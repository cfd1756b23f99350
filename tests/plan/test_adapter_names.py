"""Names of an adapter's modules are found among a model's tensors, or said to be absent."""

from __future__ import annotations

import pytest

from merge_kit.plan.applying.names import match_kohya, match_names
from merge_kit.plan.applying.split_experts import expert_lie, fused_experts

ATTENTION = ("self_attn.q_proj.weight", "self_attn.v_proj.weight")


def stack(prefix: str, layers: int = 2, suffixes=ATTENTION) -> list[str]:
    return [f"{prefix}.{i}.{suffix}" for i in range(layers) for suffix in suffixes]


def pairs(wanted: list[str], names: list[str]) -> dict[str, str]:
    """Return the matches, all of which must be clear."""
    matches = match_names(wanted, names)
    assert not matches.absent
    assert not matches.ambiguous
    return matches.found


LLAMA = [*stack("model.layers"), "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]


def test_equal_names_are_the_same_tensor():
    assert pairs(LLAMA, LLAMA) == {name: name for name in LLAMA}


@pytest.mark.parametrize(
    ("adapters", "models"),
    [
        ("transformer.h", "h"),
        ("h", "transformer.h"),
        ("model.layers", "model.language_model.layers"),
        ("model.language_model.layers", "language_model.model.layers"),
        ("model.language_model.layers", "model.layers"),
        ("model.decoder.layers", "decoder.layers"),
        ("double_blocks", "model.diffusion_model.double_blocks"),
    ],
)
def test_a_stack_with_another_prefix_is_found(adapters, models):
    found = pairs(stack(adapters), [*stack(models), "other.weight"])
    assert found == dict(zip(stack(adapters), stack(models), strict=True))


def test_what_stands_outside_layers_follows_the_stacks():
    names = [*stack("model.language_model.layers"), "model.language_model.norm.weight"]
    names += ["model.visual.norm.weight", "lm_head.weight"]
    found = pairs([*stack("model.layers"), "model.norm.weight", "lm_head.weight"], names)
    assert found["model.norm.weight"] == "model.language_model.norm.weight"
    assert found["lm_head.weight"] == "lm_head.weight"


def test_two_parts_of_a_model_may_have_a_change_of_prefix_each():
    text, vision = stack("language_model.model.layers"), stack("vision_tower.encoder.layers")
    wanted = [*stack("model.language_model.layers"), *stack("model.vision_tower.encoder.layers")]
    wanted.append("lm_head.weight")
    found = pairs(wanted, [*text, *vision, "language_model.lm_head.weight"])
    assert list(found.values()) == [*text, *vision, "language_model.lm_head.weight"]


def test_a_name_outside_layers_is_found_by_its_end():
    names = ["language_model.model.embed_tokens.weight", *stack("language_model.model.layers")]
    found = pairs(["model.embed_tokens.weight"], names)
    assert found == {"model.embed_tokens.weight": "language_model.model.embed_tokens.weight"}


def test_layers_of_a_vision_model_are_not_those_of_a_decoder():
    matches = match_names(stack("model.layers"), stack("vision_tower.model.layers"))
    assert matches.absent == stack("model.layers")


def test_layers_of_an_encoder_are_not_those_of_a_decoder():
    matches = match_names(stack("decoder.layers"), stack("model.encoder.layers"))
    assert matches.absent == stack("decoder.layers")


@pytest.mark.parametrize(
    ("adapters", "models"), [("model.layers", "draft.layers"), ("transformer.h", "decoder.h")]
)
def test_a_stack_with_other_words_is_another(adapters, models):
    assert match_names(stack(adapters), stack(models)).absent == stack(adapters)


@pytest.mark.parametrize("name", ["image_projection.linear.weight", "head.linear.weight"])
def test_a_module_with_other_words_is_another(name):
    assert match_names(["text_projection.linear.weight"], [name, *LLAMA]).absent


def test_two_stacks_that_would_do_are_named():
    names = [*stack("left.blocks"), *stack("right.blocks")]
    matches = match_names(stack("blocks"), names)
    could_be = {f"{side}.blocks.0.{ATTENTION[0]}" for side in ("left", "right")}
    assert set(matches.ambiguous[f"blocks.0.{ATTENTION[0]}"]) == could_be
    assert not matches.found


def test_of_several_stacks_the_nearest_in_name_is_taken():
    names = [*stack("text.model.layers"), *stack("draft.layers")]
    assert set(pairs(stack("model.layers"), names).values()) == set(stack("text.model.layers"))


def test_a_layer_that_the_model_lacks_is_absent():
    matches = match_names(stack("model.layers", 3), stack("model.layers", 2))
    assert matches.absent == [f"model.layers.2.{suffix}" for suffix in ATTENTION]
    renamed = match_names(stack("model.layers", 3), stack("text.model.layers", 2))
    assert renamed.absent == [f"model.layers.2.{suffix}" for suffix in ATTENTION]


def test_components_of_pipelines_are_folders_or_prefixes():
    names = ["unet/conv_in.weight", *stack("unet/down_blocks"), *stack("text_encoder/layers")]
    wanted = ["unet.conv_in.weight", *stack("unet.down_blocks"), *stack("text_encoder.layers")]
    assert list(pairs(wanted, names).values()) == names


def test_an_adapter_of_one_component_finds_it_in_a_pipeline():
    names = [*stack("unet/down_blocks"), *stack("vae/encoder.down_blocks", suffixes=("c.weight",))]
    assert set(pairs(stack("down_blocks"), names).values()) == set(stack("unet/down_blocks"))


def test_an_adapter_with_a_components_prefix_finds_it_alone():
    assert set(pairs(stack("unet.down_blocks"), stack("down_blocks")).values()) == set(
        stack("down_blocks")
    )


# kohya -------------------------------------------------------------------------------------------

KOHYA = "lora_unet_down_blocks_0_attentions_1_proj_in"


@pytest.mark.parametrize("lead", ["unet/", "transformer/", "model.diffusion_model.", ""])
def test_underscores_are_the_dots_of_one_weight(lead):
    name = f"{lead}down_blocks.0.attentions.1.proj_in.weight"
    assert match_kohya([KOHYA], [name, f"{lead}x.bias"]).found == {KOHYA: name}


@pytest.mark.parametrize(
    ("prefix", "lead"),
    [
        ("lora_te_", "text_encoder/"),
        ("lora_te1_", "text_encoder/"),
        ("lora_te2_", "text_encoder_2/"),
        ("lora_te3_", "text_encoder_3/"),
        ("lora_te1_", "conditioner.embedders.0.transformer."),
        ("lora_te_", "cond_stage_model.transformer."),
    ],
)
def test_prefixes_of_text_encoders(prefix, lead):
    names = [f"{at}text_model.layers.0.q_proj.weight" for at in (lead, "unet/")]
    module = f"{prefix}text_model_layers_0_q_proj"
    assert match_kohya([module], names).found == {module: names[0]}


def test_a_component_that_is_not_there_is_absent():
    matches = match_kohya(["lora_te2_a_b"], ["unet/a.b.weight", "text_encoder/a.b.weight"])
    assert matches.absent == ["lora_te2_a_b"]


def test_weights_that_underscores_do_not_tell_apart_are_ambiguous():
    names = ["a.b_c.weight", "a_b.c.weight"]
    assert match_kohya(["lora_unet_a_b_c"], names).ambiguous == {"lora_unet_a_b_c": tuple(names)}


# experts -----------------------------------------------------------------------------------------


def experts(module: str, parts: tuple[str, ...], count: int = 2) -> list[str]:
    return [f"{module}.experts.{i}.{part}.weight" for i in range(count) for part in parts]


def test_experts_that_are_stored_apart_make_the_fused_ones():
    names = experts("model.layers.0.mlp", ("gate_proj", "up_proj", "down_proj"))
    lead = "model.layers.0.mlp.experts"
    assert fused_experts(names) == {
        f"{lead}.gate_up_proj": tuple(
            (f"{lead}.{i}.gate_proj.weight", f"{lead}.{i}.up_proj.weight") for i in range(2)
        ),
        f"{lead}.down_proj": tuple((f"{lead}.{i}.down_proj.weight",) for i in range(2)),
    }


def test_mixtral_names_experts_by_numbers_and_its_module_otherwise():
    names = experts("model.layers.0.block_sparse_moe", ("w1", "w2", "w3"))
    fused = fused_experts(names)
    lead = "model.layers.0.block_sparse_moe.experts"
    assert fused[f"{lead}.gate_up_proj"][1] == (f"{lead}.1.w1.weight", f"{lead}.1.w3.weight")
    wanted = "model.layers.0.mlp.experts.down_proj"
    assert pairs([wanted], [*names, *fused]) == {wanted: f"{lead}.down_proj"}


def test_experts_with_gaps_or_stored_fused_make_none():
    names = experts("m", ("down_proj",), 3)
    assert "m.experts.down_proj" in fused_experts(names)
    assert not fused_experts([name for name in names if ".1." not in name])
    assert not fused_experts([*names, "m.experts.down_proj"])


@pytest.mark.parametrize(
    ("up", "down", "lie"),
    [
        ((3, 48, 16), (3, 16, 24), "straight"),
        ((3, 16, 48), (3, 24, 16), "transposed"),
        ((3, 32, 16), (3, 16, 16), "straight"),
        ((3, 16, 32), (3, 16, 16), "transposed"),
        ((3, 16, 16), (3, 16, 8), "straight"),
        ((3, 16, 16), (3, 8, 16), "transposed"),
        ((3, 16, 16), (3, 16, 16), None),
    ],
)
def test_the_two_tensors_of_experts_tell_outputs_from_inputs(up, down, lie):
    shapes = {"m.experts.gate_up_proj": up, "m.experts.down_proj": down}
    assert expert_lie("m.experts.down_proj", shapes) == lie
    assert expert_lie("m.experts.gate_up_proj", shapes) == lie


def test_the_head_of_gpt_neox_has_two_names():
    names = ["gpt_neox.embed_in.weight", "embed_out.weight"]
    for wanted in ("lm_head.weight", "embed_out.weight"):
        assert match_names([wanted], names).found == {wanted: "embed_out.weight"}
