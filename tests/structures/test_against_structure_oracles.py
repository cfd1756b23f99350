"""Random recipes that change depth or width, against float64 oracles made of the papers' words."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_models import (
    DTYPES,
    FLAVOURS,
    HEADS,
    HIDDEN,
    WIDE,
    assert_copied,
    assert_equals,
    numbers,
    write,
)

from merge_kit.api import merge
from tests import models
from tests.oracles import structures as oracle


def renamed(folders: Sequence[Path], layers: oracle.Layers) -> dict[str, torch.Tensor]:
    """Return the tensors of a model whose layers are one layer of an input each."""
    copies = [models.stored(folder) for folder in folders]
    made = {n: t for n, t in copies[0].items() if not oracle.LAYER.match(n)}
    made |= {n: t for n, t in copies[-1].items() if n in oracle.ENDING}
    for number, ((part,)) in enumerate(layers):
        lead = f"model.layers.{part.layer}."
        for name, tensor in copies[part.copy].items():
            if name.startswith(lead):
                made[f"model.layers.{number}.{name.removeprefix(lead)}"] = tensor
    return made


def depths(chance: random.Random) -> tuple[int, int, bool]:
    """Return the layers of the copies, and whether they are two models."""
    if chance.random() < 0.5:
        layers = chance.randint(2, 6)
        return layers, layers, False
    return chance.randint(2, 6), chance.randint(2, 6), True


@pytest.mark.parametrize("seed", range(24))
def test_an_upscaled_model_is_what_the_paper_or_the_textbook_says(seed, tmp_path):
    chance = random.Random(seed)
    lower, upper, two = depths(chance)
    kind, dtype = chance.choice(list(FLAVOURS)), chance.choice(DTYPES)
    tied = chance.random() < 0.3
    folders = [tmp_path / "a", tmp_path / "b"] if two else [tmp_path / "a"]
    copies = [
        write(folder, kind, depth, 10 * seed + i, dtype, tied=tied)
        for i, (folder, depth) in enumerate(zip(folders, (lower, upper), strict=False))
    ]
    copies = copies if two else [copies[0], copies[0]]
    summed = chance.random() < 0.5
    most = min(lower, upper) - 1 if summed else (min(lower, upper) - 1) // 2
    overlap = chance.randint(1, most) if most else 0
    parameters: dict[str, Any] = {"overlap_mode": "sum"} if summed else {}
    share: float | list[float] = 0.5
    if summed and chance.random() < 0.6:
        share = chance.choice([0.25, [0.0, 1.0], [0.1, 0.9, 0.3]])
        parameters["t"] = share
    blend = chance.choice(["linear", "slerp"]) if summed else "linear"
    if blend == "slerp":
        parameters["blend"] = blend
    if chance.random() < 0.5:
        total = lower + upper - overlap * (1 if summed else 2)
        parameters["target_layers"] = total
    else:
        parameters["overlap"] = overlap
    listed = [{"model": str(folder)} for folder in folders]
    recipe = {"merge_method": "depth_upscale", "models": listed, "parameters": parameters}
    merge(recipe, tmp_path / "out")
    if summed:
        anchors = share if isinstance(share, list) else [share]
        layers = oracle.pairwise(lower, upper, overlap, oracle.spread(anchors, overlap))
        assert_equals(tmp_path / "out", oracle.upscaled(copies, layers, blend), dtype)
    else:
        layers = oracle.dropped(lower, upper, overlap, overlap)
        assert_copied(tmp_path / "out", renamed([folders[0], folders[-1]], layers))
    assert models.config(tmp_path / "out")["num_hidden_layers"] == len(layers)


def test_an_odd_number_of_dropped_layers_costs_the_upper_copy_one_more(tmp_path):
    write(tmp_path / "a", "llama", 4, 1, torch.float32)
    parameters = {"target_layers": 5}
    recipe = {"merge_method": "depth_upscale", "models": [{"model": str(tmp_path / "a")}]}
    merge(recipe | {"parameters": parameters}, tmp_path / "out")
    layers = oracle.dropped(4, 4, 1, 2)
    assert len(layers) == 5
    assert_copied(tmp_path / "out", renamed([tmp_path / "a"] * 2, layers))


@pytest.mark.parametrize(("layers", "target"), [(4, 5), (4, 6), (4, 8), (6, 9), (6, 8), (3, 4)])
def test_an_expanded_model_is_its_layers_and_copies_with_silent_outputs(layers, target, tmp_path):
    write(tmp_path / "a", "qwen2", layers, target, torch.bfloat16)
    recipe = {"merge_method": "depth_upscale", "models": [{"model": str(tmp_path / "a")}]}
    parameters = {"target_layers": target, "block_expansion": True}
    merge(recipe | {"parameters": parameters}, tmp_path / "out")
    origins, added = oracle.expanded(layers, target)
    wanted = renamed([tmp_path / "a"], [[oracle.Part(0, i)] for i in origins])
    for number, silent in enumerate(added):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            full = f"model.layers.{number}.{name}.weight"
            wanted[full] = torch.zeros_like(wanted[full]) if silent else wanted[full]
    assert_copied(tmp_path / "out", wanted)


@pytest.mark.parametrize("kind", FLAVOURS)
def test_a_wider_mlp_is_zeros_behind_and_the_narrower_one_is_back(kind, tmp_path):
    numbers_of = write(tmp_path / "a", kind, 2, 3, torch.bfloat16)
    recipe = {"merge_method": "pad", "models": [{"model": str(tmp_path / "a")}]}
    merge(recipe | {"parameters": {"intermediate_size": 20}}, tmp_path / "wide")
    wide = numbers(tmp_path / "wide")
    assert wide.keys() == numbers_of.keys()
    for name, tensor in numbers_of.items():
        shape = [20 if size == WIDE else size for size in tensor.shape]
        assert np.array_equal(wide[name], oracle.padded(tensor, shape)), name
    recipe = {"merge_method": "crop", "models": [{"model": str(tmp_path / "wide")}]}
    merge(recipe | {"parameters": {"intermediate_size": WIDE}}, tmp_path / "back")
    assert_copied(tmp_path / "back", models.stored(tmp_path / "a"))
    assert (tmp_path / "back" / "config.json").read_text(encoding="utf-8") == (
        tmp_path / "a" / "config.json"
    ).read_text(encoding="utf-8")


def test_a_model_padded_to_four_times_its_width_comes_back_bit_for_bit(tmp_path):
    write(tmp_path / "a", "llama", 2, 3, torch.bfloat16)
    like = {"hidden_size": 4 * HIDDEN, "num_attention_heads": 4, "num_key_value_heads": 4}
    recipe = {"merge_method": "pad", "models": [{"model": str(tmp_path / "a")}]}
    merge(recipe | {"parameters": like}, tmp_path / "wide")
    back = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    recipe = {"merge_method": "crop", "models": [{"model": str(tmp_path / "wide")}]}
    merge(recipe | {"parameters": back}, tmp_path / "back")
    assert_copied(tmp_path / "back", models.stored(tmp_path / "a"))
