"""Stacks load in transformers, compute what their layers compute, and generate with a cache."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepened
import families
import pytest
import torch
from deepened import Layer
from families import FAMILIES, WINDOW, Family
from safetensors.torch import save_file

from merge_kit.api import merge
from merge_kit.errors import PlanError
from tests import models

Slices = Sequence[tuple[str, int, int]]

NEW = WINDOW + 8
"""Tokens generated after a prompt that is shorter than the window."""


pytestmark = pytest.mark.usefixtures("single_thread")


def deep(family: Family) -> Slices:
    """Return slices of both models that share layers, repeat them, and step back."""
    a, b = family.depths
    return [("a", 0, 2), ("b", 1, 3), ("a", 1, a), ("b", b - 1, b), ("b", b - 1, b), ("b", 2, b)]


def layers_of(slices: Slices) -> list[Layer]:
    return [(name, i) for name, start, stop in slices for i in range(start, stop)]


def recipe_of(family: Family, folders: dict[str, Path], slices: Slices) -> dict[str, Any]:
    listed = [
        {"sources": [{"model": str(folders[name]), "layer_range": [start, stop]}]}
        for name, start, stop in slices
    ]
    if family.module:
        part = {family.module: {"slices": listed}}
        return {"merge_method": "passthrough", "base_model": str(folders["a"]), "modules": part}
    return {"merge_method": "passthrough", "slices": listed}


def assert_same_function(family: Family, made: Any, by_hand: Any) -> None:
    """Hold a model to the logits of another, in one pass, step by step, and when it generates.

    Both compute the same products in the same order, so one pass gives the same bits. A cache
    changes the shapes of the products: float32 sums of 32 terms then differ by a few 1e-6.
    """
    ids = deepened.tokens(WINDOW + 10)
    whole = deepened.forward(family, made, ids)
    assert torch.equal(whole, deepened.forward(family, by_hand, ids))
    stepped = deepened.step_by_step(family, made, ids)
    torch.testing.assert_close(stepped, whole, rtol=1e-4, atol=1e-4)
    for prompt in (deepened.tokens(WINDOW - 1), deepened.tokens(WINDOW + 3)):
        cached = deepened.generated(family, made, prompt, NEW, cache=True)
        assert torch.equal(cached, deepened.generated(family, made, prompt, NEW, cache=False))
        assert torch.equal(cached, deepened.generated(family, by_hand, prompt, NEW, cache=True))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_stack_of_two_models_of_different_depth_computes_what_its_layers_do(kind, pair, tmp_path):
    family, (folders, sources) = FAMILIES[kind], pair(kind)
    slices = deep(family)
    merge(recipe_of(family, folders, slices), tmp_path / "out", shard_size=models.SHARD_BYTES)
    made = deepened.load(family, tmp_path / "out")
    assert len(made.get_submodule(family.layers)) == len(layers_of(slices))
    assert_same_function(family, made, deepened.deeper(family, sources, layers_of(slices)))


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if not FAMILIES[kind].module])
def test_a_stack_that_begins_and_ends_with_inner_layers_is_shallower(kind, pair, tmp_path):
    family, (folders, sources) = FAMILIES[kind], pair(kind)
    slices = [("b", 2, 4), ("a", 1, 2)]
    merge(recipe_of(family, folders, slices), tmp_path / "out")
    made = deepened.load(family, tmp_path / "out")
    assert_same_function(family, made, deepened.deeper(family, sources, layers_of(slices)))


TYPED = [kind for kind, family in FAMILIES.items() if family.types]


@pytest.mark.parametrize("kind", TYPED)
def test_the_types_of_the_layers_are_felt(kind, pair):
    """Without this the tests above could not see a layer that got another's window."""
    family, (_, sources) = FAMILIES[kind], pair(kind)
    order = layers_of(deep(family))
    ids = deepened.tokens(WINDOW + 10)
    own = deepened.forward(family, deepened.deeper(family, sources, order), ids)
    for kinds in ("full_attention", "sliding_attention"):
        other = deepened.deeper(family, sources, order, types=[kinds] * len(order))
        assert not torch.allclose(deepened.forward(family, other, ids), own, atol=1e-3)


def test_a_stacked_gemma_3_sees_its_pictures(pair, tmp_path):
    family, (folders, sources) = FAMILIES["gemma3"], pair("gemma3")
    slices = deep(family)
    merge(recipe_of(family, folders, slices), tmp_path / "out")
    made = deepened.load(family, tmp_path / "out")
    by_hand = deepened.deeper(family, sources, layers_of(slices))
    images = torch.full((2, 4), families.IMAGE)
    ids = torch.cat([images, deepened.tokens(9)], dim=1)
    picture = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    seen = {
        "input_ids": ids,
        "pixel_values": picture,
        "token_type_ids": (ids == families.IMAGE).long(),
    }
    with torch.inference_mode():
        found = made(**seen).logits
        assert torch.equal(found, by_hand(**seen).logits)
        assert not torch.equal(found, made(**{**seen, "pixel_values": 1 - picture}).logits)
    told = {"max_new_tokens": NEW, "do_sample": False}
    cached = made.generate(**seen, **told, use_cache=True)
    assert torch.equal(cached, made.generate(**seen, **told, use_cache=False))


# As they were published, configs give types by a period or a threshold, not layer by layer.
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen2": {"max_window_layers": 2},
    "gemma2": {},
    "gemma3_text": {"sliding_window_pattern": 6},
    "gemma3": {"sliding_window_pattern": 6},
    "cohere2": {"sliding_window_pattern": 4},
}


def published(kind: str, folders: dict[str, Path], root: Path) -> dict[str, Path]:
    """Copy two models with the config that such models had before configs listed types."""
    for name, folder in folders.items():
        target = root / name
        shutil.copytree(folder, target)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config", config)
        del text["layer_types"]
        text.pop("_sliding_window_pattern", None)
        text.update(PUBLISHED[kind])
        (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return {name: root / name for name in folders}


KEPT: dict[str, Slices] = {
    "qwen2": [("a", 0, 4), ("b", 3, 5), ("b", 2, 3), ("a", 2, 4)],
    "gemma2": [("a", 0, 4), ("b", 2, 4), ("a", 0, 2), ("b", 4, 5), ("b", 1, 2)],
    "gemma3_text": [("a", 0, 4), ("b", 2, 6), ("b", 6, 7), ("a", 1, 5)],
    "gemma3": [("a", 0, 4), ("b", 4, 6), ("b", 6, 7), ("a", 1, 6), ("b", 0, 1)],
    "cohere2": [("a", 0, 4), ("b", 0, 1), ("a", 1, 4), ("b", 4, 5)],
}
"""Stacks that keep what the period or the threshold says of their layers."""
MOVED: dict[str, Slices] = {
    "qwen2": [("a", 0, 2), ("b", 0, 2), ("a", 2, 4)],  # four layers without a window, not two
    "gemma3_text": [("a", 0, 3), ("b", 5, 7), ("a", 1, 3), ("a", 5, 6)],
    "cohere2": [("a", 0, 2), ("a", 3, 4), ("b", 0, 2), ("b", 3, 4)],
}
"""Stacks that need another threshold or period: 4, and 4 and 3 in place of 6 and 4."""
BROKEN: dict[str, tuple[Slices, str]] = {
    "qwen2": ([("a", 0, 4), ("b", 0, 2)], "max_window_layers"),
    "gemma2": ([("a", 0, 2), ("b", 1, 4)], "layer_types"),
    "gemma3_text": ([("a", 0, 6), ("b", 3, 7)], "sliding_window_pattern"),
    "gemma3": ([("a", 0, 6), ("b", 3, 7)], "sliding_window_pattern"),
    "cohere2": ([("a", 0, 4), ("b", 3, 5)], "sliding_window_pattern"),
}
"""Stacks that no value of the key named here describes."""


@pytest.mark.parametrize(
    ("kind", "slices"), [*KEPT.items(), *MOVED.items()], ids=[*KEPT, *(f"{k}-moved" for k in MOVED)]
)
def test_a_published_config_describes_a_stack_where_a_period_or_threshold_can(
    kind, slices, pair, tmp_path
):
    family, (folders, sources) = FAMILIES[kind], pair(kind)
    inputs = published(kind, folders, tmp_path)
    for name in "ab":
        types = deepened.text_of(deepened.load(family, inputs[name]).config).layer_types
        assert types == deepened.text_of(sources[name].config).layer_types
    merge(recipe_of(family, inputs, slices), tmp_path / "out")
    made = deepened.load(family, tmp_path / "out")
    assert_same_function(family, made, deepened.deeper(family, sources, layers_of(slices)))


@pytest.mark.parametrize("kind", BROKEN)
def test_a_stack_that_breaks_a_period_is_refused_by_the_name_of_its_key(kind, pair, tmp_path):
    slices, key = BROKEN[kind]
    inputs = published(kind, pair(kind)[0], tmp_path)
    with pytest.raises(PlanError, match=key) as caught:
        merge(recipe_of(FAMILIES[kind], inputs, slices), tmp_path / "out")
    assert re.search(r"layer \d", str(caught.value))
    assert not (tmp_path / "out").exists()


def test_a_key_that_numbers_layers_for_their_arithmetic_is_refused_by_its_name(pair, tmp_path):
    folders = pair("gpt2")[0]
    folder = shutil.copytree(folders["a"], tmp_path / "a")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["scale_attn_by_inverse_layer_idx"] = True
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    recipe = recipe_of(FAMILIES["gpt2"], {"a": folder}, [("a", 0, 3), ("a", 2, 4)])
    with pytest.raises(PlanError, match="scale_attn_by_inverse_layer_idx"):
        merge(recipe, tmp_path / "out")


def test_a_model_with_experts_in_every_other_layer_keeps_them_there_or_is_refused(tmp_path):
    """A layer with experts in the place of one without is stored under names that nobody reads."""
    family = FAMILIES["qwen3_moe"]
    config = family.config(4)
    config.mlp_only_layers, config.decoder_sparse_step = [], 2
    torch.manual_seed(0)
    family.model(config).save_pretrained(tmp_path / "a")
    folders = {"a": tmp_path / "a"}
    good, bad = [("a", 0, 4), ("a", 2, 4)], [("a", 0, 3), ("a", 2, 4)]
    merge(recipe_of(family, folders, good), tmp_path / "out")
    made = deepened.load(family, tmp_path / "out")
    sparse = [hasattr(layer.mlp, "experts") for layer in made.model.layers]
    assert sparse == [False, True] * 3
    with pytest.raises(PlanError, match="decoder_sparse_step"):
        merge(recipe_of(family, folders, bad), tmp_path / "other")


def test_the_first_block_of_a_t5_decoder_keeps_the_only_table_of_distances(pair, tmp_path):
    """transformers looks for the table in block 0, wherever the block that had it went."""
    family, (folders, sources) = FAMILIES["t5"], pair("t5")
    slices = [("a", 1, 3), ("a", 0, 4)]
    merge(recipe_of(family, folders, slices), tmp_path / "out")
    made = deepened.load(family, tmp_path / "out")
    attention = made.decoder.block[0].layer[0].SelfAttention
    table = sources["a"].decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    assert torch.equal(attention.relative_attention_bias.weight, table)
    query = sources["a"].decoder.block[1].layer[0].SelfAttention.q.weight
    assert torch.equal(attention.q.weight, query)


def test_a_window_that_is_switched_off_binds_no_layer(pair, tmp_path):
    """Published Qwen2 models name a window and a threshold, and use neither."""
    folders = pair("qwen2")[0]
    family, inputs = FAMILIES["qwen2"], published("qwen2", folders, tmp_path)
    for folder in inputs.values():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config |= {"use_sliding_window": False, "max_window_layers": 2}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    sources = {name: deepened.load(family, folder) for name, folder in inputs.items()}
    slices, _ = BROKEN["qwen2"]
    merge(recipe_of(family, inputs, slices), tmp_path / "out")
    made = deepened.load(family, tmp_path / "out")
    order = layers_of(slices)
    by_hand = deepened.deeper(family, sources, order, types=["full_attention"] * len(order))
    assert_same_function(family, made, by_hand)


def test_names_and_masks_of_the_first_gpt2_files_follow_their_layers(pair, tmp_path):
    folders, sources = pair("gpt2")
    family, inputs = FAMILIES["gpt2"], {}
    for name, folder in folders.items():
        inputs[name] = shutil.copytree(folder, tmp_path / name)
        for path in inputs[name].glob("*.safetensors*"):
            path.unlink()
        old = {n.removeprefix("transformer."): t for n, t in models.stored(folder).items()}
        mask = torch.ones(64, 64).tril().view(1, 1, 64, 64)
        old |= {f"h.{i}.attn.bias": mask.clone() for i in range(family.depth(name))}
        save_file(old, inputs[name] / "model.safetensors", {"format": "pt"})
    slices = deep(family)
    merge(recipe_of(family, inputs, slices), tmp_path / "out")
    depth = len(layers_of(slices))
    masks = [n for n in models.stored(tmp_path / "out") if n.endswith(".attn.bias")]
    assert sorted(masks) == sorted(f"h.{i}.attn.bias" for i in range(depth))
    made = deepened.load(family, tmp_path / "out")
    assert_same_function(family, made, deepened.deeper(family, sources, layers_of(slices)))
