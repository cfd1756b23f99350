"""Experts of what other documents make, in an order that is found: as if each were a file."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import merge_kit as mk
from merge_kit.api import merge, plan
from merge_kit.engine.matching import best_order
from merge_kit.plan.walk import merged_sources
from tests.models import assert_same_tensors, stored
from tests.structures import mixtures

EXPERTS, HIDDEN, INNER = 5, 16, 8
ORDER = [3, 0, 4, 1, 2]


def write(folder, *, fused: bool, order=None, seed: int = 0, noise: float = 0.0):
    """Save a mixture of one layer: random, with noise, its experts in an order."""
    draw = torch.Generator().manual_seed(0)
    more = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> torch.Tensor:
        base = torch.randn(shape, generator=draw)
        return base + noise * torch.randn(shape, generator=more)

    order = list(range(EXPERTS)) if order is None else order
    lead = "model.layers.0"
    tensors = {"model.embed_tokens.weight": made(20, HIDDEN), "model.norm.weight": made(HIDDEN)}
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{lead}.{name}.weight"] = made(HIDDEN)
    for name in "qkvo":
        tensors[f"{lead}.self_attn.{name}_proj.weight"] = made(HIDDEN, HIDDEN)
    for name in "qk":
        tensors[f"{lead}.self_attn.{name}_norm.weight"] = made(8)
    tensors[f"{lead}.mlp.gate.weight"] = made(EXPERTS, HIDDEN)[order]
    both, down = made(EXPERTS, 2 * INNER, HIDDEN)[order], made(EXPERTS, HIDDEN, INNER)[order]
    if fused:
        tensors |= {f"{lead}.mlp.experts.gate_up_proj": both.contiguous()}
        tensors |= {f"{lead}.mlp.experts.down_proj": down.contiguous()}
    for i in range(0 if fused else EXPERTS):
        gate, up = both[i].clone().chunk(2)
        for name, one in zip(("gate", "up", "down"), (gate, up, down[i]), strict=True):
            tensors[f"{lead}.mlp.experts.{i}.{name}_proj.weight"] = one.clone()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    config = mixtures.config("qwen3_moe", num_hidden_layers=1, num_experts=EXPERTS, vocab_size=20)
    config.moe_intermediate_size, config.num_attention_heads = INNER, 2
    config.architectures = ["Qwen3MoeForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


@pytest.fixture(scope="module", params=[False, True], ids=["split", "fused"])
def three(request, tmp_path_factory):
    """Save a reference, and two fine-tunes with their experts in another order."""
    root = tmp_path_factory.mktemp("experts")
    write(root / "r", fused=request.param)
    for seed, name in enumerate("ab", 1):
        write(root / name, fused=request.param, order=ORDER, seed=seed, noise=0.1)
    return root


def stages(root):
    """Return documents that make a model of the two, by name."""
    a, b = str(root / "a"), str(root / "b")
    pair = [{"model": a}, {"model": b}]
    based = {"base_model": a, "models": [{"model": b}, {"model": str(root / "r")}]}
    sparse = {"density": 0.5, "weight": 0.5}
    return {
        "linear": {"models": pair, "parameters": {"weight": [0.5, 0.5]}},
        "slerp": {"base_model": a, "models": pair[1:], "parameters": {"t": 0.3}},
        "task_arithmetic": {**based, "parameters": {"weight": 0.3}},
        "ties": {**based, "parameters": sparse},
        "dare_linear": {**based, "parameters": sparse},
        "match_experts": {"base_model": b, "models": [{"model": str(root / "r")}]},
        "passthrough": {"models": pair[:1], "parameters": {"scale": 0.5}},
        "project": {"models": pair[:1]},
    }


METHODS = list(stages(Path()))


@pytest.mark.parametrize("method", METHODS)
def test_a_stage_is_matched_as_the_file_of_it_is(method, three, tmp_path):
    stage = {"name": "stage", "merge_method": method, **stages(three)[method]}
    last = {"merge_method": "match_experts", "base_model": str(three / "r")}
    copy = {"merge_method": "passthrough", "models": [{"model": "stage"}]}
    merge([stage, copy], tmp_path / "file")
    merge({**last, "models": [{"model": str(tmp_path / "file")}]}, tmp_path / "apart")
    both = [stage, {**last, "models": [{"model": "stage"}]}]
    done = merge(both, tmp_path / "at-once")
    assert_same_tensors(stored(tmp_path / "at-once"), stored(tmp_path / "apart"))
    assert stored(tmp_path / "apart").keys() == stored(three / "a").keys()
    moved = [place for place, _ in list(done.report.orders.values())[-1]]
    if method in ("linear", "slerp", "passthrough", "project"):
        assert moved == [ORDER.index(i) for i in range(EXPERTS)]


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic", "match_experts"])
def test_a_step_holds_one_of_the_results_that_it_could_be_made_of(method, three):
    stage = {"name": "stage", "merge_method": method, **stages(three)[method]}
    last = {"merge_method": "match_experts", "base_model": str(three / "r")}
    made = plan([stage, {**last, "models": [{"model": "stage"}]}])
    assert max(len(merged_sources(step)) for step in made.steps) <= 1


def test_a_model_in_memory_is_matched_as_one_in_a_file(three, tmp_path):
    a, b, r = (str(three / name) for name in "abr")
    made = {
        "linear": mk.linear([a, b], weight=0.5),
        "slerp": mk.slerp(a, [b], t=0.3),
        "matched": mk.match_experts(a, base=b),
        "project": mk.project(a),
        "twice": mk.linear([mk.slerp(a, [b], t=0.3), b], weight=0.5),
    }
    for name, model in made.items():
        mk.match_experts(model, base=r).save(tmp_path / name)
        held = mk.match_experts(model, base=r).state_dict()
        assert_same_tensors(held, stored(tmp_path / name))
    half = {"name": "half", "merge_method": "linear", **stages(three)["linear"]}
    last = {"merge_method": "match_experts", "base_model": r, "models": [{"model": "half"}]}
    merge([half, last], tmp_path / "recipe")
    assert_same_tensors(stored(tmp_path / "linear"), stored(tmp_path / "recipe"))


def test_equal_orders_leave_a_model_its_own():
    """Where all exchanges of two lose, a cycle of three may still be as good."""
    generator, ties = torch.Generator().manual_seed(0), 0
    for _ in range(300):
        products = torch.randint(0, 3, (4, 4), generator=generator).double()
        sums = {
            order: sum(float(products[i, j]) for i, j in enumerate(order))
            for order in itertools.permutations(range(4))
        }
        found, own = tuple(best_order(products)), (0, 1, 2, 3)
        assert sums[found] == max(sums.values())
        if sums[own] == sums[found]:
            assert found == own
            ties += 1
    assert ties > 20
