"""The same recipes by mergekit, in an environment that MERGE_KIT_PEER names.

    python -m venv peer && peer/bin/pip install mergekit==0.1.5
    MERGE_KIT_PEER=peer pytest --full tests/test_against_peer.py

Without the variable these tests are not collected. What the dialect means stands in the other
tests as numbers; here it is held against the tool that its users come from.
"""

from __future__ import annotations

import json
import os
import subprocess
from math import isnan
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from merge_kit.errors import MergeKitError
from tests.toys import merge, plan, write

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
RECIPES = yaml.safe_load((HERE / "peer_recipes.yaml").read_text())
DIFFERENT = {name: entry["recipe"] for name, entry in RECIPES["differ"].items()}
WIDTH, INNER, WORDS = 8, 12, 16
UNIT = {
    torch.float64: 2.0**-45,
    torch.float32: 2.0**-20,
    torch.float16: 2.0**-9,
    torch.bfloat16: 2.0**-6,
}
"""Rounding of a dtype, times what the peer's arithmetic in that dtype adds to it."""


def llama(
    folder: Path,
    seed: int,
    *,
    layers=4,
    dtype=torch.float32,
    tied=False,
    near=None,
    size=1e-2,
    scale=1.0,
):
    """Write a small random Llama and return its tensors.

    Args:
        near: What it is a fine-tune of.
        size: Size of the changes of a fine-tune.
        scale: Factor on everything.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens": (WORDS, WIDTH), "model.norm": (WIDTH,)}
    shapes |= {} if tied else {"lm_head": (WORDS, WIDTH)}
    for i in range(layers):
        lead = f"model.layers.{i}"
        shapes |= {f"{lead}.self_attn.{x}_proj": (WIDTH, WIDTH) for x in "qkvo"}
        shapes |= {f"{lead}.mlp.{x}_proj": (INNER, WIDTH) for x in ("gate", "up")}
        shapes |= {f"{lead}.mlp.down_proj": (WIDTH, INNER)}
        shapes |= {f"{lead}.{x}_layernorm": (WIDTH,) for x in ("input", "post_attention")}
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        values = values if near is None else near[f"{name}.weight"] + size * values
        tensors[f"{name}.weight"] = (scale * values).to(dtype)
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "vocab_size": WORDS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": layers,
        "tie_word_embeddings": tied,
        "dtype": str(dtype).removeprefix("torch."),
    }
    write(folder, tensors, settings)
    return tensors


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Write the models that the recipes name."""
    root = tmp_path_factory.mktemp("models")
    base = llama(root / "base", 0)
    llama(root / "fine", 9, near=base)
    for seed, name in enumerate(("fa", "fb", "fc"), start=31):
        llama(root / name, seed, near=base)
    common = llama(root / "kin", 40, near=base)
    for seed, name in enumerate(("ka", "kb", "kc"), start=41):
        llama(root / name, seed, near=common, size=3e-3)
    tiny = [llama(root / "ta", 51, near=base, size=1e-4)]
    llama(root / "tb", 52, near=tiny[0], size=3e-5)
    llama(root / "tc", 53, near=base, size=4e-4)
    small = llama(root / "tiny-base", 54, near=base, size=0.0, scale=1e-6)
    llama(root / "tiny-a", 55, near=small, size=3e-7)
    llama(root / "base2", 0)
    llama(root / "nil", 0, scale=0.0)
    for seed, name in enumerate("abc", start=1):
        llama(root / name, seed)
    llama(root / "minus-a", 1, scale=-1.0)
    for name, seed, layers in (("long", 4, 6), ("long2", 14, 6), ("one", 5, 1), ("one2", 15, 1)):
        llama(root / name, seed, layers=layers)
    for name, seed in (("tied", 6), ("tied2", 7)):
        llama(root / name, seed, tied=True)
    for lead, dtype in (("bf", torch.bfloat16), ("hf", torch.float16), ("df", torch.float64)):
        for seed, name in enumerate(("base", "a", "b"), start=20):
            llama(root / f"{lead}-{name}", seed, dtype=dtype)
    return root


@pytest.fixture(scope="module")
def peer(models, tmp_path_factory):
    """Run all recipes by the peer; return the folder of the results, and its errors."""
    out = tmp_path_factory.mktemp("peer")
    recipes = out / "recipes.json"
    everything = {**RECIPES["same"], **RECIPES["coarse"], **RECIPES["refused"], **DIFFERENT}
    recipes.write_text(json.dumps(everything))
    python = Path(os.environ["MERGE_KIT_PEER"]) / "bin/python"
    command = [str(python), str(HERE / "peer_driver.py"), str(models), str(recipes), str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    return out, json.loads((out / "errors.json").read_text())


def distance(ours, theirs, least=1.0) -> float:
    """Return the largest difference of two models, in units of each tensor's rounding.

    Args:
        least: Size of the terms that cancel in what is smaller; 0 if nothing cancels.
    """
    if {n: (t.dtype, t.shape) for n, t in ours.items()} != {
        n: (t.dtype, t.shape) for n, t in theirs.items()
    }:
        return float("inf")
    worst = 0.0
    for name, tensor in theirs.items():
        scale = max(least, float(tensor.double().abs().max())) or 1.0
        apart = float((tensor.double() - ours[name].double()).abs().max())
        worst = max(worst, float("inf") if isnan(apart) else apart / scale / UNIT[tensor.dtype])
    return worst


def layers(made) -> int:
    """Return the layer count of the output's config.json."""
    file = next(f for f in made.side_files if f.name == "config.json")
    text = file.text if file.text is not None else file.source.read_text()
    return json.loads(text)["num_hidden_layers"]


@pytest.mark.parametrize("name", RECIPES["same"])
def test_the_same_result_up_to_rounding(models, peer, name):
    out, errors = peer
    assert name not in errors
    theirs = load_file(out / name / "model.safetensors")
    assert distance(merge(RECIPES["same"][name], models), theirs) <= 1
    config = json.loads((out / name / "config.json").read_text())
    assert layers(plan(RECIPES["same"][name], models)) == config["num_hidden_layers"]


@pytest.mark.parametrize("name", RECIPES["coarse"])
def test_the_same_result_where_the_peer_rounds_to_bfloat16_on_the_way(models, peer, name):
    out, _ = peer
    theirs = load_file(out / name / "model.safetensors")
    ours = merge(RECIPES["coarse"][name], models)
    assert {tensor.dtype for tensor in ours.values()} == {t.dtype for t in theirs.values()}
    narrow = [{n: t.bfloat16() for n, t in model.items()} for model in (ours, theirs)]
    assert distance(*narrow) <= 1


@pytest.mark.parametrize("name", RECIPES["refused"])
def test_both_refuse(models, peer, name):
    assert name in peer[1]
    with pytest.raises(MergeKitError):
        plan(RECIPES["refused"][name], models)


@pytest.mark.parametrize("name", RECIPES["differ"])
def test_what_differs_on_purpose_does_differ(models, peer, name):
    out, errors = peer
    assert name not in errors
    try:
        ours = merge(DIFFERENT[name], models)
    except MergeKitError:
        return  # refused here
    assert distance(ours, load_file(out / name / "model.safetensors"), 0.0) > 1
