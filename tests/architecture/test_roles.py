"""Tensors outside the layers stand before or after them."""

from __future__ import annotations

import pytest

from merge_kit.architecture.roles import outside_role
from merge_kit.architecture.stacks import Stack

BEFORE = [
    ("model.embed_tokens.weight", "model.layers"),
    ("transformer.wte.weight", "transformer.h"),
    ("wpe.weight", "h"),
    ("model.decoder.project_in.weight", "model.decoder.layers"),
    ("bert.embeddings.LayerNorm.weight", "bert.encoder.layer"),
    ("transformer.word_embeddings_layernorm.weight", "transformer.h"),
    ("model.encoder.layernorm_embedding.weight", "model.encoder.layers"),
    ("model.encoder.conv1.weight", "model.encoder.layers"),
    ("model.encoder.embed_positions.weight", "model.encoder.layers"),
    ("vit.embeddings.cls_token", "vit.encoder.layer"),
    ("vision_model.pre_layrnorm.weight", "vision_model.encoder.layers"),
    ("visual.patch_embed.proj.weight", "visual.blocks"),
    ("shared.weight", "encoder.block"),
    ("model.rotary_emb.inv_freq", "model.layers"),
    ("multi_modal_projector.linear_1.weight", "language_model.model.layers"),
    ("conv_in.weight", "down_blocks"),
    ("an_invented.scale", "model.layers"),
]
AFTER = [
    ("model.norm.weight", "model.layers"),
    ("lm_head.weight", "model.layers"),
    ("transformer.ln_f.bias", "transformer.h"),
    ("ln_f.weight", "h"),
    ("embed_out.weight", "gpt_neox.layers"),
    ("gpt_neox.final_layer_norm.bias", "gpt_neox.layers"),
    ("model.decoder.project_out.weight", "model.decoder.layers"),
    ("model.decoder.layer_norm.weight", "model.decoder.layers"),
    ("encoder.final_layer_norm.weight", "encoder.block"),
    ("proj_out.weight", "model.decoder.layers"),
    ("bert.pooler.dense.weight", "bert.encoder.layer"),
    ("cls.predictions.transform.LayerNorm.weight", "bert.encoder.layer"),
    ("classifier.weight", "vit.encoder.layer"),
    ("pre_classifier.weight", "distilbert.transformer.layer"),
    ("vit.layernorm.weight", "vit.encoder.layer"),
    ("vision_model.post_layernorm.weight", "vision_model.encoder.layers"),
    ("text_projection.weight", "text_model.encoder.layers"),
    ("logit_scale", "text_model.encoder.layers"),
    ("visual.merger.mlp.weight", "visual.blocks"),
    ("score.weight", "model.layers"),
    ("output.weight", "layers"),
    ("norm.weight", "layers"),
    ("head.weight", "blocks"),
    ("final_logits_bias", "model.decoder.layers"),
    ("conv_norm_out.weight", "up_blocks"),
]


@pytest.mark.parametrize(("name", "prefix"), BEFORE)
def test_embeddings_and_what_leads_in_stand_before(name, prefix):
    assert outside_role(name, Stack(prefix, 1, (0,))) == "before"


@pytest.mark.parametrize(("name", "prefix"), AFTER)
def test_final_norms_and_heads_stand_after(name, prefix):
    assert outside_role(name, Stack(prefix, 1, (0,))) == "after"


@pytest.mark.parametrize(
    ("name", "prefix", "role"),
    [
        ("vision_tower.encoder.layers.0.layer_norm1.weight", "model.layers", "before"),
        ("vision_tower.encoder.layers.0.self_attn.out_proj.weight", "model.layers", "before"),
        ("vision_tower.post_layernorm.weight", "language_model.model.layers", "before"),
        ("multi_modal_projector.norm.weight", "language_model.model.layers", "before"),
        ("audio_tower.layer_norm.weight", "language_model.model.layers", "before"),
        ("language_model.model.embed_tokens.weight", "vision_tower.encoder.layers", "after"),
        ("encoder.final_layer_norm.weight", "decoder.block", "before"),
        ("decoder.block.0.layer.0.layer_norm.weight", "encoder.block", "after"),
        ("model.decoder.embed_positions.weight", "model.encoder.layers", "after"),
    ],
)
def test_another_part_of_the_model_stands_on_one_side_as_a_whole(name, prefix, role):
    assert outside_role(name, Stack(prefix, 1, (0,))) == role


def test_a_module_with_layers_of_its_own_stands_where_its_name_puts_it():
    own, qformer = Stack("model.layers", 1, (0,)), Stack("model.qformer.layer", 1, (0,))
    head = Stack("classifier", 3, (0, 2))
    for name in ("model.qformer.norm.weight", "model.qformer.layer.0.norm.weight"):
        assert outside_role(name, own, (own, qformer, head)) == "before"
    for name in ("classifier.0.weight", "classifier.2.weight"):
        assert outside_role(name, own, (own, qformer, head)) == "after"
