"""The same recipes by mergekit-moe, in an environment that MERGE_KIT_PEER names.

See tests/test_against_peer.py for how to make one. Values are compared, not names: it writes the
experts of a Mixtral or of a Qwen3-MoE as one tensor a layer.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from merge_kit.errors import MergeKitError
from tests.structures.prompted import CODE, HIDDEN, LAYERS, SUMS, WEATHER
from tests.structures.test_moe_dialect import models, recipe, texts
from tests.toys import merge, plan

__all__ = ["models"]
pytestmark = pytest.mark.slow

DRIVER = Path(__file__).parent.parent / "peer_driver.py"
SHARED = "shared_experts:\n  - {source_model: qwen2-a" + texts(CODE) + "}\n"
OTHERS = SUMS, WEATHER

SAME = {
    "cheap_embed": recipe(gate_mode="cheap_embed"),
    "negative": recipe(gate_mode="cheap_embed", prompts=OTHERS),
    "bf16": recipe(gate_mode="cheap_embed", dtype="bfloat16"),
    "one a token": recipe(gate_mode="cheap_embed", experts_per_token=1),
    "scaled": recipe(gate_mode="cheap_embed", extra=(", residual_scale: 0.5", ", noise_scale: 0")),
    "base twice": recipe(gate_mode="cheap_embed").replace("llama-b,", "llama-base,"),
    "architecture": recipe(gate_mode="cheap_embed", architecture="mix"),
    "qwen3": recipe("qwen3", gate_mode="cheap_embed"),
    "qwen2": recipe("qwen2", gate_mode="cheap_embed") + SHARED,
    "llama as qwen2": recipe(gate_mode="cheap_embed", architecture="qwen")
    + SHARED.replace("qwen2", "llama"),
}
"""Recipes whose every value is the same, up to the rounding of router rows."""

DRAWN = {
    "random": recipe(gate_mode="random"),
    "uniform": recipe(gate_mode="uniform_random"),
    "noise": recipe(gate_mode="random", extra=(", noise_scale: 0.1", ", noise_scale: 0.1")),
}
"""Recipes with random numbers, which have the same distribution."""

HIDDEN_STATES = {
    "hidden": recipe(),
    "hidden_avg": recipe(gate_mode="hidden_avg"),
    "hidden_last": recipe(gate_mode="hidden_last"),
}
"""Recipes with the same experts, and other routers on purpose."""

REFUSED = {
    "no prompts": recipe(prompts=(WEATHER, None), gate_mode="cheap_embed"),
    "same prompts": recipe(prompts=(WEATHER, WEATHER), gate_mode="hidden"),
    "too many a token": recipe(gate_mode="random", experts_per_token=3),
    "none a token": recipe(gate_mode="random", experts_per_token=0),
    "two kinds": recipe(gate_mode="random").replace("llama-b,", "qwen3-b,"),
    "no such architecture": recipe(gate_mode="random", architecture="Mistral"),
    "shared in Mixtral": recipe(gate_mode="random", architecture="Mixtral")
    + SHARED.replace("qwen2", "llama"),
}


@pytest.fixture(scope="module")
def peer(models, tmp_path_factory):
    """Run all recipes by the peer; return the folder of the results, and its errors."""
    out = tmp_path_factory.mktemp("peer")
    numbered = {f"{i}": text for i, text in enumerate(everything().values())}
    (out / "recipes.json").write_text(json.dumps(numbered))
    python = Path(os.environ["MERGE_KIT_PEER"]) / "bin/python"
    command = [str(python), str(DRIVER), str(models), str(out / "recipes.json"), str(out)]
    settings = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, capture_output=True, timeout=600, env=settings)
    places = {name: out / f"{i}" for i, name in enumerate(everything())}
    errors = json.loads((out / "errors.json").read_text())
    return places, {name: errors.get(place.name) for name, place in places.items()}


def everything():
    return {**SAME, **DRAWN, **HIDDEN_STATES, **REFUSED}


def split(tensors):
    """Return the peer's tensors under the names that are written here."""
    found = {}
    for name, tensor in tensors.items():
        block, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for i, both in enumerate(tensor):
                gate, up = both.chunk(2)
                found |= {f"{block}.{i}.gate_proj.weight": gate, f"{block}.{i}.up_proj.weight": up}
        elif last == "down_proj":
            found |= {f"{block}.{i}.down_proj.weight": one for i, one in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def as_mixtral(name):
    for part, short in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        name = name.replace(f"{part}.weight", f"{short}.weight") if ".experts." in name else name
    return name.replace(".mlp.", ".block_sparse_moe.")


def both(models, peer, name):
    """Return our tensors and the peer's."""
    places, errors = peer
    assert errors[name] is None
    theirs = split(load_file(places[name] / "model.safetensors"))
    ours = merge(everything()[name], models)
    if any(".block_sparse_moe." in key for key in ours):
        theirs = {as_mixtral(key): tensor for key, tensor in theirs.items()}
    assert ours.keys() == theirs.keys()
    return ours, theirs


def is_router(name):
    return name.endswith((".gate.weight", "shared_expert_gate.weight"))


@pytest.mark.parametrize("name", SAME)
def test_the_same_tensors(models, peer, name):
    ours, theirs = both(models, peer, name)
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        if is_router(key):
            # Rows of length 1: one step of the dtype, and for float32 the peer's own sums in it.
            step = 2.0**-8 if tensor.dtype == torch.bfloat16 else 2.0**-21
            assert (ours[key].double() - tensor.double()).abs().max() <= step
        elif key.endswith("_proj.bias") and name == "llama as qwen2":
            assert not ours[key].any()  # its shape is another: the peer leaves head_dim out
            assert not tensor.any()
        else:
            assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("name", SAME)
def test_the_same_words_in_config(models, peer, name):
    theirs = json.loads((peer[0][name] / "config.json").read_text())
    file = next(f for f in plan(SAME[name], models).side_files if f.name == "config.json")
    ours = json.loads(file.text)
    keys = ("architectures", "model_type", "num_experts_per_tok", "hidden_size", "norm_topk_prob")
    keys += ("num_local_experts", "num_experts", "intermediate_size", "moe_intermediate_size")
    keys += ("shared_expert_intermediate_size", "decoder_sparse_step", "num_hidden_layers")
    if "num_experts" in ours:
        ours["num_local_experts"] = ours["num_experts"]  # transformers 5 has both names for it
    for key in set(keys) & theirs.keys():
        assert ours[key] == theirs[key], key


@pytest.mark.parametrize("name", ["random", "uniform"])
def test_routers_of_the_same_distribution(models, peer, name):
    ours, theirs = both(models, peer, name)
    for key, tensor in theirs.items():
        assert is_router(key) or torch.equal(ours[key], tensor)
    drawn = [
        torch.cat([m[k].flatten() for k in m if is_router(k)]).double() for m in (ours, theirs)
    ]
    assert len(drawn[0]) == LAYERS * 2 * HIDDEN
    size = 1.0 if name == "random" else (HIDDEN * 3) ** -0.5
    for one in drawn:  # mean and deviation within 4 times their own deviation
        assert abs(float(one.mean())) < 4 * size / len(one) ** 0.5
        assert float(one.std()) == pytest.approx(size, rel=4 / (2 * len(one)) ** 0.5)


def test_noise_of_the_same_size(models, peer):
    ours, theirs = both(models, peer, "noise")
    sources = [load_file(models / f"llama-{n}" / "model.safetensors") for n in "ab"]
    for made in (ours, theirs):
        noise = []
        for key, tensor in made.items():
            if ".experts." in key:
                _, _, layer, _, _, number, part, _ = key.split(".")
                long = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}[part]
                noise.append(
                    tensor - sources[int(number)][f"model.layers.{layer}.mlp.{long}.weight"]
                )
        drawn = torch.cat([one.flatten() for one in noise]).double()
        assert abs(float(drawn.mean())) < 4 * 0.1 / len(drawn) ** 0.5
        assert float(drawn.std()) == pytest.approx(0.1, rel=4 / (2 * len(drawn)) ** 0.5)


@pytest.mark.parametrize("name", HIDDEN_STATES)
def test_the_same_experts_and_other_routers_of_hidden_states(models, peer, name):
    ours, theirs = both(models, peer, name)
    for key, tensor in theirs.items():
        if is_router(key):
            lengths = [one.double().norm(dim=1) for one in (ours[key], tensor)]
            assert all((length - 1).abs().max() < 1e-2 for length in lengths)
            assert not torch.allclose(ours[key].double(), tensor.double(), atol=2.0**-6)
        else:
            assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("name", REFUSED)
def test_both_refuse(models, peer, name):
    assert peer[1][name] is not None
    with pytest.raises(MergeKitError):
        plan(REFUSED[name], models)
