"""Sums of adapters, truncated: what they miss is the tail of the singular values."""

from __future__ import annotations

import json

import pytest
import torch

from merge_kit import merge, plan
from tests.adapters.claims import WEIGHTS, combined, reported, truncation
from tests.adapters.makers import answers, load_adapted, tensors
from tests.oracles import adapters as oracle


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_what_a_rank_leaves_out_is_the_tail(tmp_path, zoo, rank):
    base, adapters = zoo
    done = combined("lora_svd", adapters, WEIGHTS, tmp_path / "out", rank=rank)
    wanted = oracle.summed([oracle.changes(adapter) for adapter in adapters], WEIGHTS)
    ranks = {
        name: min(rank, int(torch.linalg.matrix_rank(c, rtol=1e-9))) for name, c in wanted.items()
    }
    truncation(tmp_path / "out", wanted, ranks)
    assert float((answers(load_adapted("llama", base, tmp_path / "out"))).abs().max()) < 1e3
    reported(done, wanted, ranks)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_energy_chooses_the_smallest_rank_that_holds_it(tmp_path, zoo, energy):
    base, adapters = zoo
    done = combined("lora_svd", adapters, WEIGHTS, tmp_path / "out", energy=energy)
    wanted = oracle.summed([oracle.changes(adapter) for adapter in adapters], WEIGHTS)
    ranks = {name: oracle.rank_for_energy(change, energy) for name, change in wanted.items()}
    truncation(tmp_path / "out", wanted, ranks)
    reported(done, wanted, ranks)
    manifest = json.loads((tmp_path / "out/merge_kit.json").read_text())
    assert {f"{m}.weight": r for m, r in manifest["ranks"].items()} == ranks
    answers(load_adapted("llama", base, tmp_path / "out"))


def test_a_plan_has_upper_bounds_and_a_run_has_values(tmp_path, zoo):
    _, adapters = zoo
    recipe = {
        "merge_method": "lora_svd",
        "models": [{"model": str(adapter)} for adapter in adapters],
        "parameters": {"energy": 0.9},
    }
    bounds = {rank.key: rank for rank in plan(recipe).ranks}
    done = merge(recipe, tmp_path / "out")
    values = {rank.key: rank.rank for rank in done.plan.ranks}
    assert all(bound.fitted for bound in bounds.values())
    assert bounds.keys() == values.keys()
    assert all(values[key] <= bounds[key].rank for key in values)
    assert sum(values.values()) < sum(bound.rank for bound in bounds.values())


def test_without_rank_or_energy_the_largest_rank_of_the_inputs_is_kept(tmp_path, zoo):
    _, adapters = zoo
    combined("lora_svd", adapters, WEIGHTS, tmp_path / "out")
    name = "base_model.model.model.layers.{}.{}.lora_A.weight"
    held = tensors(tmp_path / "out")
    assert len(held[name.format(0, "self_attn.q_proj")]) == 4
    assert len(held[name.format(1, "self_attn.o_proj")]) == 7
    assert len(held[name.format(0, "mlp.down_proj")]) == 4
