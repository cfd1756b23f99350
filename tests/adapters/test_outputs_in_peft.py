"""Adapters that are made from adapters: loaded by peft, and held to sums in float64."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_kit import MergeKitError, merge, plan
from tests.adapters.makers import (
    KINDS,
    answers,
    changed,
    load_adapted,
    load_base,
    make,
    make_adapter,
    make_base,
    scale,
    tensors,
)
from tests.oracles import adapters as oracle

ROUNDING = 2.0**-22
ADDITIVE = ("lora_concat", "lora_linear", "lora_svd")
ALL = (*ADDITIVE, "lora_ties", "lora_dare", "lora_knots")
WEIGHTS = (0.75, -0.5, 1.5)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def combined(method, adapters, weights, out, *, dtype="float32", seed=0, **parameters):
    """Combine adapters and return what the run returned."""
    models = [
        {"model": str(adapter), "parameters": {"weight": weight}}
        for adapter, weight in zip(adapters, weights, strict=True)
    ]
    recipe = {"merge_method": method, "models": models, "parameters": parameters, "seed": seed}
    return merge({**recipe, **({"dtype": dtype} if dtype else {})}, out)


def assert_in_peft(kind, base, out, wanted):
    """Hold the answers of an output in peft to those of the base with these changes.

    The files mean to peft what they mean to the oracle, to rounding in float64; so what is wanted
    is compared tensor by tensor elsewhere, and here only the answers.
    """
    found = answers(load_adapted(kind, base, out))
    assert float((found - answers(changed(kind, base, oracle.changes(out)))).abs().max()) <= 1e-9
    exact = answers(changed(kind, base, wanted))
    assert float((exact - answers(load_base(kind, base))).abs().max()) > 0.01
    assert float((found - exact).abs().max()) <= 1e-4  # float32 factors; answers of size 10


def assert_sum(out, parts, weights, *, factor=8.0):
    """Hold an output to a weighted sum, to rounding in float32.

    The measure is 2^-22 of the sum of the magnitudes |w| |change|, times a factor; for results
    that are factored anew, of the largest of the whole matrix.
    """
    found, wanted = oracle.changes(out), oracle.summed(parts, weights)
    masses = oracle.masses(parts, weights)
    for name in {*found, *wanted}:
        have = found.get(name, torch.zeros(()))
        slack = factor * ROUNDING * float(masses.get(name, torch.zeros(1)).max())
        assert float((have - wanted.get(name, 0.0)).abs().max()) <= slack, name


# the adapters ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Return a base and three adapters of other ranks, targets, dtypes, scales and patterns."""
    folder = tmp_path_factory.mktemp("zoo")
    base = make_base("llama", folder / "base")
    plain = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    scaled = {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "k_proj"]}
    patterned = KINDS["both_patterns"].config
    half = torch.bfloat16
    adapters = [
        make_adapter("llama", base, folder / "plain", seed=21, **plain),
        make_adapter("llama", base, folder / "rslora", seed=22, dtype=half, **scaled),
        make_adapter("llama", base, folder / "patterns", seed=23, **patterned),
    ]
    return base, adapters


FAMILIES = {
    "llama": (
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
        {"r": 2, "lora_alpha": 6, "target_modules": "all-linear"},
    ),
    "gpt2": (
        {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        {"r": 3, "lora_alpha": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
    "net": (
        KINDS["net"].config,
        {"r": 2, "lora_alpha": 3, "target_modules": ["embed", "image", "wave"], "use_rslora": True},
    ),
    "llama_biased": (
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "lora_bias": True},
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "lora_bias": True},
    ),
}
"""Two adapters of each base that differ in rank, scale and targets."""


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    made = {}
    for name, configs in FAMILIES.items():
        folder = tmp_path_factory.mktemp(name)
        base = make_base(name, folder / "base")
        adapters = [
            make_adapter(name, base, folder / f"a{i}", seed=30 + i, **config)
            for i, config in enumerate(configs)
        ]
        made[name] = (base, adapters)
    return made


# the sum law -------------------------------------------------------------------------------------


def test_concatenation_is_the_sum(tmp_path, zoo):
    base, adapters = zoo
    combined("lora_concat", adapters, WEIGHTS, tmp_path / "out")
    parts = [oracle.changes(adapter) for adapter in adapters]
    assert_sum(tmp_path / "out", parts, WEIGHTS, factor=1.0)
    assert_in_peft("llama", base, tmp_path / "out", oracle.summed(parts, WEIGHTS))
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["use_rslora"], config["base_model_name_or_path"]) == (False, "base")
    held = tensors(tmp_path / "out")
    name = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_A.weight"
    assert held[name.format(1, "q")].shape == (4 + 3 + 4, 16)
    assert held[name.format(0, "q")].shape == (4 + 3 + 2, 16)
    assert held[name.format(0, "o")].shape == (7, 16)


@pytest.mark.parametrize("method", ["lora_linear", "lora_svd"])
def test_linear_and_full_svd_are_the_sum(tmp_path, zoo, method):
    base, adapters = zoo
    more = {"rank": 16} if method == "lora_svd" else {"normalize": False}
    combined(method, adapters, WEIGHTS, tmp_path / "out", **more)
    parts = [oracle.changes(adapter) for adapter in adapters]
    assert_sum(tmp_path / "out", parts, WEIGHTS)
    assert_in_peft("llama", base, tmp_path / "out", oracle.summed(parts, WEIGHTS))


def test_the_mean_divides_by_the_sum_of_the_weights(tmp_path, zoo):
    _, adapters = zoo
    combined("lora_linear", adapters, (1, 2, 1), tmp_path / "out", normalize=True)
    parts = [oracle.changes(adapter) for adapter in adapters]
    assert_sum(tmp_path / "out", parts, (0.25, 0.5, 0.25))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ADDITIVE)
def test_every_kind_of_module_is_summed(tmp_path, families, method, family):
    base, adapters = families[family]
    more = {"rank": 64} if method == "lora_svd" else {}
    combined(method, adapters, (0.75, -1.5), tmp_path / "out", **more)
    parts = [oracle.changes(adapter) for adapter in adapters]
    assert_sum(tmp_path / "out", parts, (0.75, -1.5))
    assert_in_peft(family, base, tmp_path / "out", oracle.summed(parts, (0.75, -1.5)))


@pytest.mark.parametrize("method", ADDITIVE)
def test_embeddings_with_the_weight_below_them_are_summed(tmp_path, method):
    base = make_base("llama", tmp_path / "base")
    configs = [
        {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj"]},
        {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens"], "use_rslora": True},
    ]
    adapters = [
        make_adapter("llama", base, tmp_path / f"a{i}", seed=40 + i, **config)
        for i, config in enumerate(configs)
    ]
    more = {"rank": 64} if method == "lora_svd" else {}
    combined(method, adapters, (0.5, -2.0), tmp_path / "out", dtype=None, **more)
    parts = [oracle.changes(adapter) for adapter in adapters]
    assert_sum(tmp_path / "out", parts, (0.5, -2.0))
    assert_in_peft("llama", base, tmp_path / "out", oracle.summed(parts, (0.5, -2.0)))


@pytest.mark.parametrize("base_kind", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("method", ["lora_concat", "lora_linear"])
def test_experts_are_summed(tmp_path, method, base_kind):
    base = make_base(base_kind, tmp_path / "base")
    config = {**KINDS[base_kind].config, "r": 2}
    adapters = [
        make_adapter(base_kind, base, tmp_path / "a", seed=51, **config),
        make_adapter(base_kind, base, tmp_path / "b", seed=52, **{**config, "lora_alpha": 3}),
    ]
    combined(method, adapters, (1.0, -0.5), tmp_path / "out")
    both = scale(load_adapted(base_kind, base, *adapters), (1.0, -0.5))
    found = answers(load_adapted(base_kind, base, tmp_path / "out"))
    assert float((found - answers(both)).abs().max()) <= 1e-4


@pytest.mark.parametrize("method", ["lora_svd", "lora_ties", "lora_dare", "lora_knots"])
def test_experts_in_one_tensor_are_refused_by_what_forms_matrices(tmp_path, method):
    base, one = make("qwen3_moe", tmp_path)
    two = make_adapter("qwen3_moe", base, tmp_path / "two", seed=3, **KINDS["qwen3_moe"].config)
    with pytest.raises(MergeKitError, match="experts.gate_up_proj") as caught:
        combined(method, [one, two], (1.0, 1.0), tmp_path / "out")
    assert "lora_concat" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("targets", [["mlp.experts.down_proj"], ["mlp.experts.gate_up_proj"]])
def test_experts_that_adapters_target_differently_are_summed_or_refused(tmp_path, targets):
    base, one = make("qwen3_moe", tmp_path)
    config = {**KINDS["qwen3_moe"].config, "target_parameters": targets}
    two = make_adapter("qwen3_moe", base, tmp_path / "two", seed=3, **config)
    try:
        combined("lora_concat", [one, two], (1.0, 0.5), tmp_path / "out")
    except MergeKitError as error:  # peft names factors by how many parameters are targeted
        assert "target_parameters" in str(error)  # noqa: PT017
        return
    models = [
        {"model": {"model": str(base), "lora": [str(one), {"path": str(two), "weight": 0.5}]}}
    ]
    merge({"merge_method": "passthrough", "models": models}, tmp_path / "whole")
    wanted = answers(load_base("qwen3_moe", tmp_path / "whole"))
    found = answers(load_adapted("qwen3_moe", base, tmp_path / "out"))
    assert float((found - wanted).abs().max()) <= 1e-4


def test_a_bias_of_some_is_a_bias_of_zero_for_the_others(tmp_path):
    base = make_base("llama_biased", tmp_path / "base")
    configs = [
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "lora_bias": True},
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "o_proj"]},
    ]
    adapters = [
        make_adapter("llama_biased", base, tmp_path / f"a{i}", seed=60 + i, **config)
        for i, config in enumerate(configs)
    ]
    combined("lora_concat", adapters, (2.0, 0.5), tmp_path / "out")
    parts = [oracle.changes(adapter) for adapter in adapters]
    assert_in_peft("llama_biased", base, tmp_path / "out", oracle.summed(parts, (2.0, 0.5)))


def test_narrow_outputs_copy_the_largest_factors_and_round_the_others_once(tmp_path, zoo):
    _, adapters = zoo
    halves = [tmp_path / f"half{i}" for i in range(2)]
    for source, half in zip((adapters[0], adapters[2]), halves, strict=True):
        shutil.copytree(source, half)
        held = {k: v.half() for k, v in load_file(source / "adapter_model.safetensors").items()}
        save_file(held, half / "adapter_model.safetensors")
    combined("lora_concat", halves, (1.0, 0.125), tmp_path / "out", dtype=None)
    name = "base_model.model.model.layers.0.self_attn.v_proj.lora_{}.weight"
    out, first = tensors(tmp_path / "out"), tensors(halves[0])
    assert out[name.format("A")].dtype == torch.float16
    for part in "AB":
        rows = first[name.format(part)].shape[0 if part == "A" else 1]
        found = out[name.format(part)]
        kept = found[:rows] if part == "A" else found[:, :rows]
        assert torch.equal(kept, first[name.format(part)])
    parts = [oracle.changes(half) for half in halves]
    found, wanted = oracle.changes(tmp_path / "out"), oracle.summed(parts, (1.0, 0.125))
    for module, change in wanted.items():  # one rounding of b to 11 bits
        assert float((found[module] - change).norm()) <= 2.0**-11 * float(change.norm())


# one adapter, and nothing ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_of_weight_1_comes_out_as_it_went_in(tmp_path, kind):
    _, adapter = make(kind, tmp_path)
    combined("lora_concat", [adapter], [1.0], tmp_path / "out", dtype=None)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        found, wanted = (folder / file for folder in (tmp_path / "out", adapter))
        if file.endswith("json"):
            assert found.read_text() == wanted.read_text()
        else:
            held, had = load_file(found), load_file(wanted)
            assert held.keys() == had.keys()
            assert all(torch.equal(held[n], had[n]) for n in had)
            assert all(held[n].dtype == had[n].dtype for n in had)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("kind", ["both_patterns", "net", "fan_in_fan_out", "lora_bias"])
def test_every_method_keeps_one_adapter_of_weight_1(tmp_path, method, kind):
    _, adapter = make(kind, tmp_path)
    combined(method, [adapter], [1.0], tmp_path / "out", dtype=None)
    held, had = tensors(tmp_path / "out"), tensors(adapter)
    assert held.keys() == had.keys()
    assert all(torch.equal(held[name], had[name]) for name in had)
    texts = [(folder / "adapter_config.json").read_text() for folder in (tmp_path / "out", adapter)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("method", ADDITIVE)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_minus_itself_is_zero_to_the_bit(tmp_path, families, method, family):
    base, (adapter, _) = families[family]
    combined(method, [adapter, adapter], [0.7, -0.7], tmp_path / "out", dtype=None)
    assert all(not change.any() for change in oracle.changes(tmp_path / "out").values())
    found = answers(load_adapted(family, base, tmp_path / "out"))
    assert torch.equal(found, answers(load_base(family, base)))


@pytest.mark.parametrize("method", ADDITIVE)
def test_an_adapter_minus_a_copy_is_zero_to_rounding(tmp_path, zoo, method):
    base, (_, _, adapter) = zoo
    shutil.copytree(adapter, tmp_path / "copy")
    combined(method, [adapter, tmp_path / "copy"], [1.0, -1.0], tmp_path / "out")
    before, after = oracle.changes(adapter), oracle.changes(tmp_path / "out")
    for name, change in before.items():
        assert float(after.get(name, torch.zeros(1)).norm()) <= 1e-6 * float(change.norm())
    found = answers(load_adapted("llama", base, tmp_path / "out"))
    assert float((found - answers(load_base("llama", base))).abs().max()) <= 1e-5


def test_an_adapter_named_twice_counts_with_the_sum_of_its_weights(tmp_path, zoo):
    _, (adapter, other, _) = zoo
    combined("lora_concat", [adapter, other, adapter], [0.25, 1.0, 0.75], tmp_path / "out")
    parts = [oracle.changes(a) for a in (adapter, other)]
    assert_sum(tmp_path / "out", parts, (1.0, 1.0), factor=1.0)
    name = "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"
    assert torch.equal(tensors(tmp_path / "out")[name], tensors(adapter)[name])


def test_a_weight_of_zero_leaves_an_adapter_out(tmp_path, zoo):
    _, (adapter, other, _) = zoo
    combined("lora_concat", [adapter, other], [1.0, 0.0], tmp_path / "out", dtype="float32")
    assert_sum(tmp_path / "out", [oracle.changes(adapter)], [1.0], factor=0.0)


# truncation --------------------------------------------------------------------------------------


def truncation(out, wanted, ranks):
    """Hold an output to the best of its ranks: what it misses is the tail, to rounding."""
    found = oracle.changes(out)
    for name, change in wanted.items():
        norm, tail = float(change.norm()), oracle.tail(change, ranks[name])
        missed = float((found[name] - change).norm())
        assert missed == pytest.approx(tail, rel=1e-4, abs=2.0**-20 * norm), name
        assert int(torch.linalg.matrix_rank(oracle.matrix(found[name]), rtol=1e-6)) <= ranks[name]


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


def reported(done, wanted, ranks):
    """Hold what a run says it has missed to what it missed."""
    facts = {module.rpartition("/")[2]: fact for module, fact in done.report.facts.items()}
    for name, change in wanted.items():
        fact = facts[name.removesuffix(".weight")]
        assert fact["norm"] == pytest.approx(float(change.norm()), rel=1e-5)
        floor = 2.0**-20 * float(change.norm())
        assert fact["residual"] == pytest.approx(
            oracle.tail(change, ranks[name]), rel=1e-3, abs=floor
        )


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


# sparse and aligned merges -----------------------------------------------------------------------

DENSITIES = (0.5, 0.75, 0.3)


def changes_of(adapters):
    """Return every module that some adapter changes, with zeros where one does not."""
    parts = [oracle.changes(adapter) for adapter in adapters]
    blank = oracle.summed(parts, [0.0] * len(parts))
    return [{**blank, **part} for part in parts]


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


# what is not a low-rank change -------------------------------------------------------------------


@pytest.fixture(scope="module")
def holders(tmp_path_factory):
    """Return a base, an adapter that holds a head whole, another one, and one that does not."""
    folder = tmp_path_factory.mktemp("holders")
    base = make_base("llama", folder / "base")
    saves = KINDS["head_saved"].config
    return (
        base,
        make_adapter("llama", base, folder / "one", seed=71, **saves),
        make_adapter("llama", base, folder / "two", seed=72, **saves),
        make_adapter("llama", base, folder / "none", seed=73, **KINDS["plain"].config),
    )


HEAD = "base_model.model.lm_head.weight"


def test_a_module_that_one_adapter_holds_is_kept(tmp_path, holders):
    base, one, _, none = holders
    combined("lora_concat", [none, one], [0.5, 1.0], tmp_path / "out")
    assert torch.equal(tensors(tmp_path / "out")[HEAD], tensors(one)[HEAD])
    wanted = oracle.summed([oracle.changes(none), oracle.changes(one)], (0.5, 1.0))
    model = changed("llama", base, wanted)
    with torch.no_grad():
        model.lm_head.weight.copy_(tensors(one)[HEAD])
    found = answers(load_adapted("llama", base, tmp_path / "out"))
    assert float((found - answers(model)).abs().max()) <= 1e-4


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, -1.0), (0.5, 0.5)])
def test_a_module_that_two_hold_is_refused_by_name(tmp_path, holders, weights):
    _, one, two, _ = holders
    with pytest.raises(MergeKitError, match="lm_head") as caught:
        combined("lora_concat", [one, two], weights, tmp_path / "out")
    assert caught.value.code() in (2, 3)
    assert "saved" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_held_module_of_another_weight_than_1_is_refused_by_name(tmp_path, holders):
    _, one, _, none = holders
    with pytest.raises(MergeKitError, match="lm_head"):
        combined("lora_concat", [one, none], [0.5, 1.0], tmp_path / "out")


def test_held_modules_are_averaged_or_taken_from_the_first_where_asked(tmp_path, holders):
    base, one, two, _ = holders
    combined("lora_concat", [one, two], [1.0, 3.0], tmp_path / "mean", saved="mean")
    combined("lora_concat", [one, two], [1.0, 3.0], tmp_path / "first", saved="first")
    heads = [tensors(adapter)[HEAD].double() for adapter in (one, two)]
    mean = tensors(tmp_path / "mean")[HEAD].double()
    shares = [(0.25, 0.75), (0.5, 0.5)]  # by weight, or each alike: the method says which
    misses = [float((mean - a * heads[0] - b * heads[1]).abs().max()) for a, b in shares]
    assert min(misses) <= 1e-6
    assert torch.equal(tensors(tmp_path / "first")[HEAD].double(), heads[0])
    for name in ("mean", "first"):
        answers(load_adapted("llama", base, tmp_path / name))


def test_equal_modules_of_all_holders_are_kept(tmp_path, holders):
    _, one, two, none = holders
    shutil.copytree(two, tmp_path / "two")
    held = tensors(two) | {HEAD: tensors(one)[HEAD]}
    save_file(held, tmp_path / "two/adapter_model.safetensors")
    combined("lora_concat", [one, tmp_path / "two", none], [0.5, -0.5, 2.0], tmp_path / "out")
    assert torch.equal(tensors(tmp_path / "out")[HEAD], tensors(one)[HEAD])


@pytest.mark.parametrize("kind", ["bias_lora_only", "bias_all", "tokens", "norms_saved"])
def test_other_things_held_whole_are_kept_beside_others_or_refused_by_name(tmp_path, kind):
    base, holder = make(kind, tmp_path)
    name = KINDS[kind].base
    other = make_adapter(
        name, base, tmp_path / "other", seed=81, r=2, lora_alpha=3, target_modules=["o_proj"]
    )
    combined("lora_concat", [holder, other], [1.0, 0.5], tmp_path / "out")
    # peft calls a bias of a module that it adapts, as others do in the sum, one of the base_layer
    held = {n.replace(".base_layer", ""): t for n, t in tensors(tmp_path / "out").items()}
    had = {n.replace(".base_layer", ""): t for n, t in tensors(holder).items()}
    whole = [n for n in had if "lora_" not in n]
    assert whole
    assert all(torch.equal(held[n], had[n]) for n in whole)
    both = load_adapted(name, base, tmp_path / "out")
    alone = load_adapted(name, base, holder)
    assert float((answers(both) - answers(alone)).abs().max()) > 1e-3
    shutil.copytree(holder, tmp_path / "second")
    others = {n: t * 1.25 for n, t in tensors(holder).items()}
    save_file(others, tmp_path / "second/adapter_model.safetensors")
    with pytest.raises(MergeKitError) as caught:
        combined("lora_concat", [holder, tmp_path / "second"], [1.0, 1.0], tmp_path / "no")
    module = whole[0].removeprefix("base_model.model.").removesuffix(".weight")
    assert module.split(".token_adapter")[0] in str(caught.value)


@pytest.mark.parametrize("method", ALL)
def test_lengths_of_dora_cannot_be_combined(tmp_path, method):
    base, dora = make("dora", tmp_path)
    plain = make_adapter("llama", base, tmp_path / "plain", **KINDS["plain"].config)
    for adapters, weights in (([dora, plain], (1.0, 1.0)), ([dora], (0.5,))):
        with pytest.raises(MergeKitError, match="DoRA") as caught:
            combined(method, adapters, weights, tmp_path / "out")
        assert caught.value.code() in (2, 3)
        assert not (tmp_path / "out").exists()


# many at once ------------------------------------------------------------------------------------

USES = {"chat": [1.0, 0.5, 0.0], "code": [-0.5, 0.0, 2.0], "all": [1.0, 1.0, 1.0]}


@pytest.mark.parametrize("method", ALL)
def test_one_run_makes_an_adapter_for_each_use(tmp_path, zoo, method):
    base, adapters = zoo
    models = [{"model": str(adapter)} for adapter in adapters]
    more = {"rank": 16} if method not in {"lora_concat", "lora_linear"} else {}
    recipe = {"merge_method": method, "models": models, "uses": USES, "parameters": more}
    merge({**recipe, "dtype": "float32"}, tmp_path / "out")
    parts = [oracle.changes(adapter) for adapter in adapters]
    for use, weights in USES.items():
        answers(load_adapted("llama", base, tmp_path / "out" / use))
        if method in ADDITIVE:
            assert_sum(tmp_path / "out" / use, parts, weights)
        combined(method, adapters, weights, tmp_path / use, **more)
        alone, found = oracle.changes(tmp_path / use), oracle.changes(tmp_path / "out" / use)
        for name in {*alone, *found}:
            blank = torch.zeros_like(alone.get(name, found.get(name)))
            miss = found.get(name, blank) - alone.get(name, blank)
            assert float(miss.abs().max()) <= 1e-5, name


# extraction --------------------------------------------------------------------------------------


def extracted(base, tuned, out, **parameters):
    recipe = {
        "merge_method": "lora_extract",
        "base_model": str(base),
        "models": [{"model": str(tuned)}],
        "parameters": parameters,
    }
    return merge(recipe, out)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Return a base, what an adapter of rank 2 to 7 makes of it, and the adapter."""
    folder = tmp_path_factory.mktemp("tuned")
    base, adapter = make("both_patterns", folder)
    changed("llama", base, oracle.changes(adapter)).save_pretrained(folder / "tuned")
    return base, folder / "tuned", adapter


def test_a_known_change_is_recovered(tmp_path, tuned):
    base, whole, adapter = tuned
    extracted(base, whole, tmp_path / "out", rank=7)
    found, wanted = oracle.changes(tmp_path / "out"), oracle.changes(adapter)
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():
        assert float((found[name] - change).norm()) <= 1e-5 * float(change.norm()), name
    logits = answers(load_adapted("llama", base, tmp_path / "out"))
    assert float((logits - answers(load_base("llama", whole))).abs().max()) <= 1e-4
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]


def test_energy_finds_the_true_ranks(tmp_path, tuned):
    base, whole, adapter = tuned
    extracted(base, whole, tmp_path / "out", energy=1 - 1e-9)
    found, had = oracle.read(tmp_path / "out").tensors, oracle.read(adapter).tensors
    factors = [name for name in had if "lora_A" in name]
    assert {n: len(found[n]) for n in factors} == {n: len(had[n]) for n in factors}


def test_what_extraction_leaves_out_is_the_tail(tmp_path, tuned):
    base, whole, adapter = tuned
    done = extracted(base, whole, tmp_path / "out", rank=1)
    wanted = oracle.changes(adapter)
    ranks = dict.fromkeys(wanted, 1)
    truncation(tmp_path / "out", wanted, ranks)
    reported(done, wanted, ranks)


@pytest.mark.parametrize("kind", ["gpt2", "net", "llama_biased", "llama_tied", "mixtral"])
def test_every_base_is_extracted_whole(tmp_path, kind):
    base = make_base(kind, tmp_path / "base", torch.float32)
    make_base(kind, tmp_path / "tuned", torch.float32, seed=2)
    extracted(base, tmp_path / "tuned", tmp_path / "out", rank=64, rest="save")
    found = answers(load_adapted(kind, base, tmp_path / "out"))
    wanted = answers(load_base(kind, tmp_path / "tuned"))
    assert float((found - wanted).abs().max()) <= 1e-3 * float(wanted.abs().max())


def norms_changed(base, folder):
    """Return a copy of a base with another final norm and another projection."""
    shutil.copytree(base, folder)
    held = tensors(base)
    held["model.norm.weight"] = held["model.norm.weight"] * 1.5
    name = "model.layers.0.self_attn.q_proj.weight"
    generator = torch.Generator().manual_seed(5)
    held[name] = held[name] + 0.1 * torch.randn(16, 16, generator=generator, dtype=held[name].dtype)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_what_has_no_low_rank_is_saved_refused_or_dropped_as_asked(tmp_path):
    base = make_base("llama", tmp_path / "base", torch.float32)
    whole = norms_changed(base, tmp_path / "tuned")
    extracted(base, whole, tmp_path / "save", rank=16, rest="save")
    name = "base_model.model.model.norm.weight"
    norm = tensors(whole)["model.norm.weight"]
    assert torch.equal(tensors(tmp_path / "save")[name], norm)
    found = answers(load_adapted("llama", base, tmp_path / "save"))
    assert float((found - answers(load_base("llama", whole))).abs().max()) <= 1e-4
    with pytest.raises(MergeKitError, match=r"model\.norm"):
        extracted(base, whole, tmp_path / "refuse", rank=16, rest="refuse")
    done = extracted(base, whole, tmp_path / "drop", rank=16, rest="drop")
    assert name not in tensors(tmp_path / "drop")
    dropped = [f.tensor for f in done.plan.fates if f.what == "dropped"]
    assert any("model.norm.weight" in tensor for tensor in dropped)


def test_an_extracted_adapter_goes_back_into_its_base(tmp_path, tuned):
    base, whole, _ = tuned
    extracted(base, whole, tmp_path / "out", rank=7)
    models = [{"model": f"{base}+{tmp_path / 'out'}"}]
    merge({"merge_method": "passthrough", "models": models}, tmp_path / "back")
    wanted = tensors(whole)
    for name, tensor in tensors(tmp_path / "back").items():
        assert float((tensor - wanted[name]).norm()) <= 1e-5 * float(wanted[name].norm()), name
