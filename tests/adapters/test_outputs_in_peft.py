"""Adapters that are sums of adapters: loaded by peft, and held to sums in float64."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_kit import MergeKitError, merge
from tests.adapters.claims import (
    ADDITIVE,
    ALL,
    FAMILIES,
    WEIGHTS,
    assert_in_peft,
    assert_sum,
    combined,
)
from tests.adapters.makers import (
    KINDS,
    answers,
    load_adapted,
    load_base,
    make,
    make_adapter,
    make_base,
    scale,
    tensors,
)
from tests.oracles import adapters as oracle

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
    with pytest.raises(MergeKitError, match=r"experts\.gate_up_proj") as caught:
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
