"""TIES, DARE and KnOTS of adapters: what is done to changes, and not to factors."""

from __future__ import annotations

import shutil

import pytest

from merge_kit import merge
from tests.adapters.claims import (
    FAMILIES,
    ROUNDING,
    WEIGHTS,
    assert_in_peft,
    assert_sum,
    changes_of,
    combined,
    truncation,
)
from tests.adapters.makers import tensors
from tests.oracles import adapters as oracle

DENSITIES = (0.5, 0.75, 0.3)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("family", [*FAMILIES, "zoo"])
def test_ties_is_that_of_the_changes(tmp_path, families, zoo, family, normalize):
    base, adapters = zoo if family == "zoo" else families[family]
    weights, densities = WEIGHTS[: len(adapters)], DENSITIES[: len(adapters)]
    models = [
        {"model": str(a), "parameters": {"weight": w, "density": d}}
        for a, w, d in zip(adapters, weights, densities, strict=True)
    ]
    parameters = {"normalize": normalize, "rank": 64}
    recipe = {"merge_method": "lora_ties", "models": models, "parameters": parameters}
    merge({**recipe, "dtype": "float32"}, tmp_path / "out")
    parts = changes_of(adapters)
    wanted = {}
    for name in parts[0]:
        if name.endswith(".bias"):
            continue
        of_all = [part[name] for part in parts]
        wanted[name] = oracle.ties(of_all, weights, densities, normalize=normalize)
    found = oracle.changes(tmp_path / "out")
    masses = oracle.masses(parts, weights)
    for name, change in wanted.items():
        slack = 32 * ROUNDING * float(masses[name].max())  # rounded factors of a dense matrix
        assert float((found[name] - change).abs().max()) <= slack, name
    whole = {**found, **wanted}
    assert_in_peft("llama" if family == "zoo" else family, base, tmp_path / "out", whole)


def test_ties_is_compressed_to_the_sum_of_the_ranks(tmp_path, zoo):
    _, adapters = zoo
    combined("lora_ties", adapters, WEIGHTS, tmp_path / "out", density=0.5)
    parts = changes_of(adapters)
    wanted = {name: oracle.ties([p[name] for p in parts], WEIGHTS, (0.5,) * 3) for name in parts[0]}
    ranks = {}
    for name, change in wanted.items():
        module = name.removesuffix(".weight")
        found = [
            oracle.read(a).tensors.get(f"{oracle.PREFIX}{module}.lora_A.weight") for a in adapters
        ]
        ranks[name] = min(sum(len(a) for a in found if a is not None), *change.shape)
    truncation(tmp_path / "out", wanted, ranks)


@pytest.mark.parametrize("family", ["zoo", "gpt2", "net"])
@pytest.mark.parametrize("ties", [False, True])
def test_dare_draws_as_it_does_for_whole_models(tmp_path, zoo, families, ties, family):
    base, adapters = zoo if family == "zoo" else families[family]
    weights = WEIGHTS[: len(adapters)]
    more = {"density": 0.6, "ties": ties, "rank": 64, "seed": 5}
    combined("lora_dare", adapters, weights, tmp_path / "out", **more)
    models = [
        {"model": f"{base}+{adapter}", "parameters": {"weight": weight, "density": 0.6}}
        for adapter, weight in zip(adapters, weights, strict=True)
    ]
    method = "dare_ties" if ties else "dare_linear"
    recipe = {"merge_method": method, "base_model": str(base), "models": models, "seed": 5}
    merge(recipe, tmp_path / "whole")
    before, after = tensors(base), tensors(tmp_path / "whole")
    parts = changes_of(adapters)
    masses = oracle.masses(parts, weights)
    wanted = {name: after[name] - before[name] for name in masses}
    found = oracle.changes(tmp_path / "out")
    for name, change in wanted.items():
        slack = 32 * ROUNDING * float(masses[name].max()) / 0.6
        assert float((found[name] - change).abs().max()) <= slack, name
    assert_in_peft("llama" if family == "zoo" else family, base, tmp_path / "out", wanted)


@pytest.mark.parametrize("family", ["llama", "net", "zoo"])
def test_knots_is_ties_in_the_space_that_all_share(tmp_path, families, zoo, family):
    base, adapters = zoo if family == "zoo" else families[family]
    weights = WEIGHTS[: len(adapters)]
    combined("lora_knots", adapters, weights, tmp_path / "out", density=0.6, rank=64)
    parts, found = changes_of(adapters), oracle.changes(tmp_path / "out")
    for name in parts[0]:
        outputs = name.startswith("embed")  # columns of an embedding, rows of other matrices
        of_all = [part[name].T if outputs else part[name] for part in parts]
        changing = [i for i, change in enumerate(of_all) if change.any()]
        if len(changing) < 2:
            continue  # one alone spans the space: nothing to align
        some = [of_all[i] for i in changing]
        wanted = oracle.knots(some, [weights[i] for i in changing], [0.6] * len(some))
        have = found[name].T if outputs else found[name]
        largest = max(float(change.norm()) for change in some)
        assert float((have - wanted).norm()) <= 1e-5 * largest, name
    assert_in_peft("llama" if family == "zoo" else family, base, tmp_path / "out", found)


def test_knots_at_full_density_without_votes_against_is_the_sum(tmp_path, zoo):
    _, (adapter, _, _) = zoo
    shutil.copytree(adapter, tmp_path / "copy")
    combined(
        "lora_knots", [adapter, tmp_path / "copy"], (1.0, 0.5), tmp_path / "out", normalize=False
    )
    assert_sum(tmp_path / "out", [oracle.changes(adapter)], [1.5], factor=32.0)
