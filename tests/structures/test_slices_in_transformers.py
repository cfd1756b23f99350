"""Sums and stacks in one recipe, of models of different depth, as transformers loads them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests import models
from tests.models import build, load, logits

SHORT, LONG = 4, 6
TYPES = ["full_attention", "sliding_attention"] * 3
KINDS: dict[str, dict[str, Any]] = {"llama": {}, "qwen3": {"layer_types": TYPES}}
"""Of the longer model; the shorter Qwen3 has a window in its even layers."""
OUTPUT_TYPES = ["sliding_attention", "full_attention"]
OUTPUT_TYPES += ["sliding_attention", "full_attention"]  # of layers 2 and 3 of the shorter one
OUTPUT_TYPES += [TYPES[5], TYPES[0], TYPES[3], TYPES[5]]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Let torch use one thread, which is the fastest for models as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_of_copies_sums_and_scaled_layers_is_what_its_parts_make(kind, tmp_path):
    a = models.save(kind, tmp_path / "a", 1)
    b = models.save(kind, tmp_path / "b", 2, num_hidden_layers=LONG, **KINDS[kind])
    halved = {"scale": [{"filter": "o_proj", "value": 0.5}, {"filter": "down_proj", "value": 0.5}]}
    recipe = {
        "merge_method": "passthrough",
        "base_model": str(a),
        "slices": [
            {"sources": [{"model": str(a), "layer_range": [0, 2]}]},
            {
                "merge_method": "linear",
                "sources": [
                    {"model": str(a), "layer_range": [2, 4], "parameters": {"weight": 0.25}},
                    {"model": str(b), "layers": [4, 1], "parameters": {"weight": 0.75}},
                ],
            },
            {"sources": [{"model": str(b), "layers": [5, 0, 3]}], "parameters": halved},
            {"sources": [{"model": str(b), "layer_range": [5, 6]}]},
        ],
    }
    models.merge(recipe, tmp_path / "out")
    one, other, made = load(kind, a), load(kind, b), load(kind, tmp_path / "out")

    types = {"layer_types": OUTPUT_TYPES} if KINDS[kind] else {}
    wanted = build(kind, 3, num_hidden_layers=8, **types)
    short = [layer.state_dict() for layer in one.model.layers]
    long = [layer.state_dict() for layer in other.model.layers]
    assert (len(short), len(long)) == (SHORT, LONG)
    summed = [
        models.averaged([x, y], (0.25, 0.75)) for x, y in ((short[2], long[4]), (short[3], long[1]))
    ]
    scaled = [
        {
            name: weight * 0.5 if "o_proj" in name or "down_proj" in name else weight
            for name, weight in long[i].items()
        }
        for i in (5, 0, 3)
    ]
    parts = [*short[:2], *summed, *scaled, long[5]]
    for layer, weights in zip(wanted.model.layers, parts, strict=True):
        layer.load_state_dict(weights)
    wanted.model.embed_tokens.load_state_dict(one.model.embed_tokens.state_dict())
    wanted.model.norm.load_state_dict(other.model.norm.state_dict())
    wanted.lm_head.load_state_dict(other.lm_head.state_dict())

    wanted.save_pretrained(tmp_path / "wanted")
    wanted = load(kind, tmp_path / "wanted")

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 8
    if KINDS[kind]:
        assert config["layer_types"] == OUTPUT_TYPES
    models.assert_same_tensors(made.state_dict(), wanted.state_dict())
    assert torch.equal(logits(kind, made), logits(kind, wanted))
    prompt = torch.tensor([[5, 9, 11, 7]])
    with torch.inference_mode():
        answers = [
            model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=cached)
            for model, cached in ((made, True), (wanted, True), (made, False))
        ]
    assert torch.equal(answers[0], answers[1])
    assert answers[0].shape == answers[2].shape == (1, 16)
