"""The published stacks: their plans at the true shapes, and their layers at small ones."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_kit import api
from merge_kit.plan.describe_steps import layer_lines

ROOT = Path(__file__).parent.parent.parent
RECIPES = ROOT / "recipes" / "published"
XWIN, EURYALE, MISTRAL = "Xwin-LM-70B-V0.1", "Euryale-1.3-L2-70B", "Mistral-7B-v0.1"
GOLIATH = [
    *((XWIN, i) for i in range(16)),
    *((EURYALE, i) for i in range(8, 24)),
    *((XWIN, i) for i in range(17, 32)),
    *((EURYALE, i) for i in range(25, 40)),
    *((XWIN, i) for i in range(33, 48)),
    *((EURYALE, i) for i in range(41, 56)),
    *((XWIN, i) for i in range(49, 64)),
    *((EURYALE, i) for i in range(57, 72)),
    *((XWIN, i) for i in range(65, 80)),
]
SOLAR = [*((MISTRAL, i) for i in range(24)), *((MISTRAL, i) for i in range(8, 32))]


@pytest.fixture(scope="module")
def benchmark():
    """Import the scripts that know the public shapes."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def twins(tmp_path_factory, benchmark):
    folder = tmp_path_factory.mktemp("twins")
    benchmark("make_twins").publish(folder, 5 * 10**9)
    return folder


def test_goliath_has_the_published_layers_parameters_and_bytes(twins, monkeypatch):
    monkeypatch.chdir(twins)
    plan = api.plan(RECIPES / "goliath.yaml")
    attention = 8192 * 8192 * 2 + 1024 * 8192 * 2  # q and o; k and v of 8 heads of 128
    layer = attention + 3 * 28_672 * 8192 + 2 * 8192
    assert layer == 855_654_400
    parameters = 137 * layer + 2 * 32_000 * 8192 + 8192
    assert parameters == 117_748_948_992  # "118 B"
    assert (plan.layers, plan.parameters) == (137, parameters)
    assert plan.bill.written_bytes == 2 * parameters
    assert plan.counts()[:2] == (0, 137 * 9 + 3)
    assert not [note for note in plan.notes if "more than once" in note]
    assert layer_lines(plan) == [
        f"model.layers 0-15 from input-1:{XWIN} 0-15",
        f"model.layers 16-31 from input-2:{EURYALE} 8-23",
        f"model.layers 32-46 from input-1:{XWIN} 17-31",
        f"model.layers 47-61 from input-2:{EURYALE} 25-39",
        f"model.layers 62-76 from input-1:{XWIN} 33-47",
        f"model.layers 77-91 from input-2:{EURYALE} 41-55",
        f"model.layers 92-106 from input-1:{XWIN} 49-63",
        f"model.layers 107-121 from input-2:{EURYALE} 57-71",
        f"model.layers 122-136 from input-1:{XWIN} 65-79",
    ]


def test_solar_has_the_published_layers_parameters_and_bytes(twins, monkeypatch):
    monkeypatch.chdir(twins)
    plan = api.plan(RECIPES / "solar.yaml")
    layer = 4096 * 4096 * 2 + 1024 * 4096 * 2 + 3 * 14_336 * 4096 + 2 * 4096
    assert layer == 218_112_000
    parameters = 48 * layer + 2 * 32_000 * 4096 + 4096
    assert parameters == 10_731_524_096  # "10.7 B"
    assert (plan.layers, plan.parameters) == (48, parameters)
    assert plan.bill.written_bytes == 2 * parameters
    (note,) = [note for note in plan.notes if "more than once" in note]
    assert note.endswith(f": 8-23 of input-1:{MISTRAL} (twice)")


def test_the_largest_public_shape_is_planned_from_its_headers(twins):
    slices = [
        {"sources": [{"model": str(twins / "Llama-3.1-405B"), "layer_range": [a, a + 42]}]}
        for a in (0, 42, 84, 84)
    ]
    plan = api.plan({"merge_method": "passthrough", "slices": slices})
    attention = 2 * 16_384**2 + 2 * 1024 * 16_384
    layer = attention + 3 * 53_248 * 16_384 + 2 * 16_384
    assert plan.layers == 168
    assert plan.parameters == 168 * layer + 2 * 128_256 * 16_384 + 16_384


@pytest.mark.parametrize(
    ("name", "wanted"), [("goliath", GOLIATH), ("solar", SOLAR)], ids=["goliath", "solar"]
)
def test_each_layer_equals_its_source_bit_for_bit(name, wanted, benchmark, tmp_path, monkeypatch):
    shapes = benchmark("llama").Llama(80 if name == "goliath" else 32, 8, 12, 2, 1, 16)
    tensors = {}
    for seed, model in enumerate(dict.fromkeys(model for model, _ in wanted)):
        generator = torch.Generator().manual_seed(seed)
        tensors[model] = {
            tensor: torch.randn(shape, generator=generator).to(torch.bfloat16)
            for tensor, shape in shapes.tensors()
        }
        (tmp_path / model).mkdir()
        save_file(tensors[model], tmp_path / model / "model.safetensors")
        (tmp_path / model / "config.json").write_text(json.dumps(shapes.config()))
    monkeypatch.chdir(tmp_path)
    done = api.merge(RECIPES / f"{name}.yaml", tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert done.plan.layers == len(wanted)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == shapes.config() | {"num_hidden_layers": len(wanted)}
    first = wanted[0][0]
    outside = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    for tensor in outside:
        assert torch.equal(made.pop(tensor), tensors[first][tensor])
    suffixes = [n.split(".", 3)[3] for n in tensors[first] if n.startswith("model.layers.0.")]
    for i, (model, layer) in enumerate(wanted):
        for suffix in suffixes:
            source = tensors[model][f"model.layers.{layer}.{suffix}"]
            assert torch.equal(made.pop(f"model.layers.{i}.{suffix}"), source)
    assert not made
