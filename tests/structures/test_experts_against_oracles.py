"""Random recipes that make, take apart and sort experts, against float64 oracles."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from plain_models import FLAVOURS, LAYOUT_OF, WIDE, assert_copied, assert_equals, numbers, write
from safetensors.torch import save_file

from merge_kit.api import merge
from tests import models
from tests.oracles import structures as oracle


def assert_described(
    config: dict[str, Any],
    layout: str,
    parameters: dict[str, Any],
    count: int,
    sparse: Sequence[int],
    layers: int,
) -> None:
    """Hold a config to the number of experts and to the layers that have them."""
    assert config["model_type"] == layout
    assert config["num_experts_per_tok"] == parameters["experts_per_token"]
    key = "num_local_experts" if layout == "mixtral" else "num_experts"
    assert config[key] == count
    if layout != "mixtral":
        assert config["norm_topk_prob"] is True
        assert config["moe_intermediate_size"] == WIDE
        step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers", [])
        read = [i for i in range(layers) if i not in dense and (i + 1) % step == 0]
        assert read == list(sparse)


@pytest.mark.parametrize("seed", range(16))
def test_an_upcycled_model_has_the_experts_names_and_bytes_of_its_layout(seed, tmp_path):
    chance = random.Random(seed)
    kind, dtype = chance.choice(list(FLAVOURS)), chance.choice([torch.float32, torch.bfloat16])
    layout, layers = LAYOUT_OF[kind], chance.randint(1, 4)
    several = chance.random() < 0.5
    count = chance.randint(2, 4)
    names = [f"e{i}" for i in range(count)] if several else []
    base = write(tmp_path / "base", kind, layers, seed, dtype)
    experts = [
        write(tmp_path / name, kind, layers, 100 * seed + i, dtype) for i, name in enumerate(names)
    ] or [base] * count
    parameters: dict[str, Any] = {"router": chance.choice(["zero", "random", "uniform_random"])}
    if not several:
        parameters["num_experts"] = count
    parameters["experts_per_token"] = chance.randint(1, count)
    sparse = list(range(layers))
    if layout != "mixtral" and layers > 1 and chance.random() < 0.7:
        sparse = sorted(chance.sample(range(layers), chance.randint(1, layers - 1)))
        parameters["sparse_layers"] = sparse
    average = several and chance.random() < 0.5
    if average:
        parameters["non_experts"] = "average"
    scale = chance.choice([1.0, 0.5, -0.3])
    if scale != 1:
        parameters["residual_scale"] = scale
    recipe = {"merge_method": "sparse_upcycle", "base_model": str(tmp_path / "base")}
    if several:
        recipe["models"] = [{"model": str(tmp_path / name)} for name in names]
    merge(recipe | {"parameters": parameters}, tmp_path / "out")

    wanted, chosen = oracle.upcycled(layout, base, experts, sparse, [scale] * count)
    if average:
        wanted |= {n: oracle.averaged(experts, n) for n in wanted if ".experts." not in n}
        for layer in set(range(layers)) - set(sparse):
            for name in oracle.GATED:
                full = f"model.layers.{layer}.mlp.{name}.weight"
                wanted[full] = oracle.averaged(experts, full)
    found = models.stored(tmp_path / "out")
    assert {name: tuple(found[name].shape) for name in chosen} == chosen
    assert all(found[name].isfinite().all() for name in chosen)
    silent = ("shared_expert.down_proj.weight",)
    silent += (".gate.weight",) if parameters["router"] == "zero" else ()
    assert not any(found[name].any() for name in chosen if name.endswith(silent))
    assert_equals(tmp_path / "out", wanted, dtype, besides=chosen)
    assert_described(models.config(tmp_path / "out"), layout, parameters, count, sparse, layers)


@pytest.mark.parametrize("kind", FLAVOURS)
@pytest.mark.parametrize("chosen", [2, [0, 2], "all"])
def test_a_dense_model_out_of_experts_has_theirs_or_their_mean(kind, chosen, tmp_path):
    dtype, layout = torch.float32, LAYOUT_OF[kind]
    names = [f"e{i}" for i in range(3)]
    for i, name in enumerate(names):
        write(tmp_path / name, kind, 2, i, dtype)
    up = {
        "merge_method": "sparse_upcycle",
        "base_model": str(tmp_path / "e0"),
        "models": [{"model": str(tmp_path / name)} for name in names],
    }
    if layout != "mixtral":
        up["parameters"] = {"sparse_layers": [1]}
    merge(up, tmp_path / "moe")
    down = {"merge_method": "moe_to_dense", "models": [{"model": str(tmp_path / "moe")}]}
    merge(down | {"parameters": {"experts": chosen}}, tmp_path / "out")
    held = [chosen] if isinstance(chosen, int) else [0, 1, 2] if chosen == "all" else chosen
    wanted = oracle.back(layout, numbers(tmp_path / "moe"), held, 2)
    assert_equals(tmp_path / "out", wanted, dtype)
    own = models.config(tmp_path / "out")["model_type"]
    assert own == kind or {own, kind} == {"llama", "mistral"}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("by", ["weights", "router"])
@pytest.mark.parametrize("seed", range(3))
def test_permuted_experts_come_back_in_the_order_of_the_reference(kind, by, seed, tmp_path):
    """Other order, and a little training: exhaustion over all orders finds the same one."""
    layout, count, layers = LAYOUT_OF[kind], 4, 2
    names = [f"e{i}" for i in range(count)]
    for i, name in enumerate(names):
        write(tmp_path / name, kind, layers, 10 * seed + i, torch.float32)
    recipe = {
        "merge_method": "sparse_upcycle",
        "base_model": str(tmp_path / "e0"),
        "models": [{"model": str(tmp_path / name)} for name in names],
        "parameters": {"router_scale": 1.0},
    }
    merge(recipe, tmp_path / "reference")
    reference = models.stored(tmp_path / "reference")
    generator = torch.Generator().manual_seed(seed)
    permuted, orders = dict(reference), []
    for layer in range(layers):
        order = torch.randperm(count, generator=generator).tolist()
        orders.append(order)
        router = oracle.router_name(layout, layer)
        permuted[router] = reference[router][order]
        for expert in range(count):
            own = oracle.expert_names(layout, layer, expert).values()
            others = oracle.expert_names(layout, layer, order[expert]).values()
            permuted |= {a: reference[b] for a, b in zip(own, others, strict=True)}
    trained = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in permuted.items()
    }
    (tmp_path / "moved").mkdir()
    save_file(trained, tmp_path / "moved" / "model.safetensors", {"format": "pt"})
    config = (tmp_path / "reference" / "config.json").read_text(encoding="utf-8")
    (tmp_path / "moved" / "config.json").write_text(config, encoding="utf-8")
    recipe = {
        "merge_method": "match_experts",
        "base_model": str(tmp_path / "reference"),
        "models": [{"model": str(tmp_path / "moved")}],
        "parameters": {"by": by},
    }
    merge(recipe, tmp_path / "out")
    wanted = dict(trained)
    for layer in range(layers):
        flat = [
            [
                np.concatenate([model[n].double().numpy().ravel() for n in names.values()])
                for names in (oracle.expert_names(layout, layer, e) for e in range(count))
            ]
            for model in (reference, trained)
        ]
        best = oracle.matched(*flat)
        assert [orders[layer][i] for i in best] == list(range(count))
        router = oracle.router_name(layout, layer)
        wanted[router] = trained[router][best]
        for expert, other in enumerate(best):
            own = oracle.expert_names(layout, layer, expert).values()
            theirs = oracle.expert_names(layout, layer, other).values()
            wanted |= {a: trained[b] for a, b in zip(own, theirs, strict=True)}
    assert_copied(tmp_path / "out", wanted)
