"""Heads that may be tied, and the embeddings that stand in for them."""

from __future__ import annotations

import pytest

from merge_kit.architecture.ties import embedding_for, head_name, is_head, is_tied
from merge_kit.core.tensors import TensorSpec


def specs(*names: str, shape: tuple[int, ...] = (32, 8)) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, "BF16", shape) for name in names}


@pytest.mark.parametrize(
    ("head", "embedding"),
    [
        ("lm_head.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "transformer.wte.weight"),
        ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
        ("embed_out.weight", "gpt_neox.embed_in.weight"),
        ("proj_out.weight", "model.decoder.embed_tokens.weight"),
        ("output.weight", "tok_embeddings.weight"),
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
        ("lm_head.weight", "shared.weight"),
        ("lm_head.weight", "backbone.embeddings.weight"),
        ("encoder.embed_tokens.weight", "shared.weight"),
        ("model.decoder.embed_tokens.weight", "model.shared.weight"),
    ],
)
def test_a_head_and_its_embedding(head, embedding):
    found = specs(embedding, "model.norm.weight", "model.layers.0.embed_tokens.weight")
    assert is_head(head)
    assert is_head(head)
    assert embedding_for(head, found, (32, 8)) == embedding
    assert embedding_for(head, {**found, **specs(head)}) == embedding


def test_an_embedding_of_another_shape_does_not_stand_in():
    assert embedding_for("lm_head.weight", specs("model.embed_tokens.weight"), (40, 8)) is None
    assert embedding_for("encoder.embed_tokens.weight", specs("shared.weight"), (40, 8)) is None


def test_the_embedding_of_the_same_part_stands_in():
    found = specs("talker.model.embed_tokens.weight", "thinker.model.embed_tokens.weight")
    assert embedding_for("thinker.lm_head.weight", found) == "thinker.model.embed_tokens.weight"


def test_positions_and_vision_do_not_stand_in():
    found = specs("wpe.weight", "vision_tower.embeddings.weight", "model.embed_positions.weight")
    assert embedding_for("lm_head.weight", found) is None


def test_the_decoders_embedding_goes_before_the_encoders():
    found = specs("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    assert embedding_for("lm_head.weight", found) == "decoder.embed_tokens.weight"


def test_tensors_of_layers_are_no_heads():
    for name in ("h.0.attn.output.weight", "encoder.layer.1.output.weight", "norm.weight"):
        assert not is_head(name)


def test_the_head_nearest_to_the_root():
    assert (
        head_name(["model.mtp.lm_head.weight", "lm_head.weight", "norm.weight"]) == "lm_head.weight"
    )
    assert head_name(["shared.weight", "encoder.embed_tokens.weight"]) is None


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        (None, None),
        ({}, True),
        ({"tie_word_embeddings": False}, False),
        ({"text_config": {"tie_word_embeddings": False}}, False),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, True),
        ({"vision_config": {"tie_word_embeddings": False}}, True),
        ({"tie_word_embeddings": None}, True),
    ],
)
def test_what_a_config_says_of_ties(config, tied):
    assert is_tied(config) is tied
