"""Which tensors of which model the experts hold, and what noise and factors do to them."""

from __future__ import annotations

import json
import math

import dense_models
import pytest
import torch
from dense_models import LAYERS
from safetensors.torch import load_file, save_file

from merge_kit.api import merge, plan
from merge_kit.methods import noise

PARTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the folders of a base and of three other models of its architecture."""
    root = tmp_path_factory.mktemp("models")
    names = ("base", "one", "two", "three")
    return {n: dense_models.saved(root / n, "llama", seed) for seed, n in enumerate(names)}


def recipe(folders, *models, base="base", **parameters):
    listed = [m if isinstance(m, dict) else {"model": str(folders[m])} for m in models]
    shown = {"models": listed} if listed else {}
    base_model = {"base_model": str(folders[base])} if base else {}
    return {"merge_method": "sparse_upcycle", **base_model, **shown, "parameters": parameters}


def written(path, text):
    path.write_text(text)
    return path


def expert(tensors, layer, number, part):
    return tensors[f"model.layers.{layer}.block_sparse_moe.experts.{number}.{PARTS[part]}.weight"]


def dense(tensors, layer, part):
    return tensors[f"model.layers.{layer}.mlp.{part}.weight"]


def others(tensors):
    """Return the tensors that are no MLP, no expert and no router."""
    return {n: t for n, t in tensors.items() if "mlp" not in n and "block_sparse_moe" not in n}


def assert_experts(made, models):
    for layer in range(LAYERS):
        for number, model in enumerate(models):
            for part in PARTS:
                assert torch.equal(expert(made, layer, number, part), dense(model, layer, part))
        assert f"model.layers.{layer}.block_sparse_moe.experts.{len(models)}.w1.weight" not in made


def test_each_model_is_one_expert_and_all_else_is_the_base_s(folders, tmp_path):
    done = merge(recipe(folders, "one", "two", "three"), tmp_path)
    made = dense_models.tensors(tmp_path)
    sources = {name: dense_models.tensors(path) for name, path in folders.items()}
    assert_experts(made, [sources[n] for n in ("one", "two", "three")])
    assert all(torch.equal(t, others(sources["base"])[n]) for n, t in others(made).items())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_local_experts"] == 3
    assert config["num_experts_per_tok"] == 2
    for origin in done.plan.layer_map:
        keys = [key for key, _ in origin.sources]
        assert len(keys) == 4
        assert {layer for _, layer in origin.sources} == {origin.layer}


def test_more_experts_repeat_the_models_in_turn(folders, tmp_path):
    merge(recipe(folders, "one", "two", num_experts=6, experts_per_token=3), tmp_path)
    one, two = (dense_models.tensors(folders[n]) for n in ("one", "two"))
    assert_experts(dense_models.tensors(tmp_path), [one, two, one, two, one, two])


def test_without_a_base_the_first_model_lends_the_rest(folders, tmp_path):
    merge(recipe(folders, "two", "one", base=""), tmp_path)
    first = dense_models.tensors(folders["two"])
    assert all(torch.equal(t, first[n]) for n, t in others(dense_models.tensors(tmp_path)).items())


def test_a_single_model_gives_eight_copies(folders, tmp_path):
    merge(recipe(folders, router="zero"), tmp_path)
    base = dense_models.tensors(folders["base"])
    made = dense_models.tensors(tmp_path)
    assert_experts(made, [base] * 8)
    for layer in range(LAYERS):
        assert not made[f"model.layers.{layer}.block_sparse_moe.gate.weight"].any()


def test_every_input_tensor_has_a_fate_with_its_reason(folders):
    made = plan(recipe(folders, "one", "two"))
    fates = {(f.model, f.tensor): f for f in made.fates}
    assert len(fates) == 3 * len(dense_models.tensors(folders["base"]))
    ours = {name: key for key, name in ((i.key, i.name) for i in made.inputs)}
    for (key, name), fate in fates.items():
        is_mlp = ".mlp." in name
        taken = is_mlp if key != ours["base"] else not is_mlp
        assert fate.what == ("copied" if taken else "dropped")
        if not taken:
            why = "the experts are those of the models" if is_mlp else "only the MLPs of experts"
            assert why in fate.why


def test_copies_are_copied_by_the_kernel(folders):
    made = plan(recipe(folders, "one", "two", num_experts=4))
    computed = [t.key for step in made.steps if step.action == "merge" for t in step.outputs]
    assert computed == [f"model.layers.{i}.block_sparse_moe.gate.weight" for i in range(LAYERS)]


def test_the_mean_of_the_models_is_exact(folders, tmp_path):
    merge(recipe(folders, "one", "two", "three", non_experts="average"), tmp_path)
    made = dense_models.tensors(tmp_path)
    models = [dense_models.tensors(folders[n]) for n in ("one", "two", "three")]
    assert_experts(made, models)
    for name, tensor in others(made).items():
        exact = sum(model[name].double() for model in models) / 3
        size = sum(model[name].double().abs() for model in models) / 3
        assert ((tensor - exact).abs() <= 2**-22 * size + 2**-24 * exact.abs()).all()


def test_the_mean_leaves_the_base_out_unless_it_is_listed(folders):
    made = plan(recipe(folders, "one", "two", non_experts="average"))
    base = next(i.key for i in made.inputs if i.is_base)
    assert {f.why for f in made.fates if f.model == base and ".mlp." not in f.tensor} == {
        "the mean of the models is taken"
    }


def test_the_rest_may_be_a_merge_by_any_method(folders, tmp_path):
    text = f"""
name: rest
merge_method: ties
base_model: {folders["base"]}
models:
  - {{model: {folders["one"]}, parameters: {{weight: 0.5}}}}
  - {{model: {folders["two"]}, parameters: {{weight: 0.5}}}}
parameters: {{density: 0.5}}
dtype: float32
---
merge_method: sparse_upcycle
base_model: rest
models: [{{model: {folders["one"]}}}, {{model: {folders["two"]}}}]
"""
    merge(written(tmp_path / "recipe.yaml", text), tmp_path / "out")
    alone = text.partition("---")[0].replace("name: rest\n", "")
    merge(written(tmp_path / "rest.yaml", alone), tmp_path / "rest")
    made, rest = dense_models.tensors(tmp_path / "out"), dense_models.tensors(tmp_path / "rest")
    assert all(torch.equal(tensor, rest[name]) for name, tensor in others(made).items())
    assert_experts(made, [dense_models.tensors(folders[n]) for n in ("one", "two")])
    dense_models.load(tmp_path / "out")


def test_experts_may_be_stages(folders, tmp_path):
    text = f"""
name: mixed
merge_method: linear
models:
  - {{model: {folders["one"]}, parameters: {{weight: 1}}}}
  - {{model: {folders["two"]}, parameters: {{weight: 3}}}}
dtype: float32
---
merge_method: sparse_upcycle
base_model: {folders["base"]}
models: [{{model: mixed}}, {{model: {folders["three"]}}}]
"""
    merge(written(tmp_path / "recipe.yaml", text), tmp_path / "out")
    made = dense_models.tensors(tmp_path / "out")
    one, two = (dense_models.tensors(folders[n]) for n in ("one", "two"))
    for part in PARTS:
        wanted = 0.25 * dense(one, 1, part) + 0.75 * dense(two, 1, part)
        assert torch.allclose(expert(made, 1, 0, part), wanted, rtol=0, atol=1e-6)


def test_a_model_with_an_adapter_is_an_expert(folders, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    target = "base_model.model.model.layers.1.mlp.up_proj"
    a, b = torch.randn(2, 32), torch.randn(40, 2)
    save_file(
        {f"{target}.lora_A.weight": a, f"{target}.lora_B.weight": b},
        adapter / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    for reference in (f"{folders['base']}+{adapter}", str(adapter)):
        models = [{"model": reference}, "one"]
        merge(recipe(folders, *models), tmp_path / "out", overwrite=True)
        made = dense_models.tensors(tmp_path / "out")
        base = dense_models.tensors(folders["base"])
        wanted = dense(base, 1, "up_proj") + b @ a
        assert torch.allclose(expert(made, 1, 0, "up_proj"), wanted, rtol=0, atol=1e-5)
        assert torch.equal(expert(made, 1, 0, "gate_proj"), dense(base, 1, "gate_proj"))


def test_the_recipe_s_dtype_is_that_of_every_tensor(folders, tmp_path):
    merge({**recipe(folders, "one", "two"), "dtype": "bfloat16"}, tmp_path)
    made = dense_models.tensors(tmp_path)
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    one = dense_models.tensors(folders["one"])
    assert torch.equal(expert(made, 2, 0, "down_proj"), dense(one, 2, "down_proj").bfloat16())
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_experts_of_two_dtypes_take_the_wider_one(folders, tmp_path):
    half = tmp_path / "half"
    dense_models.build("llama", 1).bfloat16().save_pretrained(half)
    merge(recipe(folders, {"model": str(half)}, "two"), tmp_path / "out")
    made = dense_models.tensors(tmp_path / "out")
    kinds = {tensor.dtype for name, tensor in made.items() if "block_sparse_moe" in name}
    assert kinds == {torch.float32}
    dense_models.load(tmp_path / "out")


def test_noise_is_normal_and_each_expert_s_own(folders, tmp_path):
    merge({**recipe(folders, num_experts=4, noise_scale=0.5), "seed": 7}, tmp_path)
    made, base = dense_models.tensors(tmp_path), dense_models.tensors(folders["base"])
    draws = []
    for number in range(4):
        for layer in range(LAYERS):
            for part in PARTS:
                found = expert(made, layer, number, part).double()
                added = found - dense(base, layer, part).double()
                key = f"{layer}/{number}/mlp.{part}.weight"
                drawn = noise.normal((7, key), 0, added.numel()).view(added.shape).double() * 0.5
                assert (added - drawn).abs().max() <= 2**-22 * 4  # one rounding of numbers below 4
                draws.append(added.flatten())
    every = torch.stack(draws)  # (36, 1280)
    assert abs(every.std().item() - 0.5) < 0.5 * 4 / math.sqrt(2 * every.numel())
    assert abs(every.mean().item()) < 0.5 * 4 / math.sqrt(every.numel())
    correlations = torch.corrcoef(every) - torch.eye(len(every), dtype=torch.float64)
    assert correlations.abs().max() < 6 / math.sqrt(every.shape[1])


def test_noise_and_factor_are_set_for_each_model_and_the_factor_comes_last(folders, tmp_path):
    loud = {"model": str(folders["one"]), "parameters": {"noise_scale": 0.3, "residual_scale": -2}}
    merge(recipe(folders, loud, "two", residual_scale=0.5), tmp_path)
    made = dense_models.tensors(tmp_path)
    one, two = (dense_models.tensors(folders[n]) for n in ("one", "two"))
    for layer in range(LAYERS):
        assert torch.equal(expert(made, layer, 1, "up_proj"), dense(two, layer, "up_proj"))
        assert torch.equal(expert(made, layer, 1, "down_proj"), dense(two, layer, "down_proj") / 2)
        for part, factor in (("gate_proj", 1), ("up_proj", 1), ("down_proj", -2)):
            key = f"{layer}/0/mlp.{part}.weight"
            old = dense(one, layer, part).double()
            drawn = noise.normal((0, key), 0, old.numel()).view(old.shape).double() * 0.3
            wanted = factor * (old + drawn)
            error = (expert(made, layer, 0, part) - wanted).abs()
            assert (error <= 2**-22 * abs(factor) * (old.abs() + drawn.abs())).all()


def test_noise_is_the_same_for_any_number_of_threads(folders, tmp_path):
    asked = recipe(folders, "one", "two", noise_scale=0.1, residual_scale=0.3)
    merge(asked, tmp_path / "a", threads=1)
    merge(asked, tmp_path / "b", threads=3)
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_output_can_be_sharded(folders, tmp_path):
    merge({**recipe(folders, "one", "two"), "shard_size": "30kB"}, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    dense_models.load(tmp_path)


def test_a_tied_model_stays_tied(tmp_path):
    before = dense_models.saved(tmp_path / "dense", "qwen3, tied")
    merge(recipe({"base": before}, num_experts=2), tmp_path / "out")
    assert "lm_head.weight" not in dense_models.tensors(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True


def test_the_mean_with_an_untied_model_has_a_head_of_its_own(tmp_path):
    tied = dense_models.saved(tmp_path / "tied", "llama, tied")
    free = dense_models.saved(tmp_path / "free", "llama", 1)
    asked = recipe({"tied": tied, "free": free}, "tied", "free", base="tied", non_experts="average")
    merge(asked, tmp_path / "out")
    made, a, b = (dense_models.tensors(tmp_path / n) for n in ("out", "tied", "free"))
    wanted = (a["model.embed_tokens.weight"] + b["lm_head.weight"]) / 2
    assert torch.allclose(made["lm_head.weight"], wanted, rtol=0, atol=1e-6)
    assert dense_models.load(tmp_path / "out").config.tie_word_embeddings is False


class TestSharedExpert:
    """The expert that every token of a Qwen2-MoE passes."""

    def made(self, tmp_path, shared=None, **parameters):
        paths = {n: tmp_path / n for n in ("base", "one", "two")}
        for seed, path in enumerate(paths.values()):
            if not path.exists():
                dense_models.saved(path, "qwen2", seed)
        asked = recipe(paths, "one", "two", **parameters)
        if shared is not None:
            asked["shared_experts"] = [shared]
        done = merge(asked, tmp_path / "out", overwrite=True)
        return done.plan, dense_models.tensors(tmp_path / "out")

    def test_it_adds_nothing_at_first(self, tmp_path):
        _, made = self.made(tmp_path)
        base = dense_models.tensors(tmp_path / "base")
        for layer in range(LAYERS):
            module = f"model.layers.{layer}.mlp.shared_expert"
            assert not made[f"{module}.down_proj.weight"].any()
            assert torch.equal(made[f"{module}.up_proj.weight"], dense(base, layer, "up_proj"))
            assert made[f"{module}_gate.weight"].shape == (1, 32)

    def test_a_copy_of_the_base_is_said_to_change_the_function(self, tmp_path):
        planned, made = self.made(tmp_path, shared_expert="copy")
        base = dense_models.tensors(tmp_path / "base")
        found = made["model.layers.1.mlp.shared_expert.down_proj.weight"]
        assert torch.equal(found, dense(base, 1, "down_proj"))
        assert any("does not compute what the base does" in note for note in planned.notes)

    def test_another_model_can_be_it(self, tmp_path):
        other = dense_models.saved(tmp_path / "other", "qwen2", 9, intermediate_size=24)
        factors = {"residual_scale": 0.5}
        shared = {"model": str(other), "parameters": factors}
        _, made = self.made(tmp_path, shared)
        theirs = dense_models.tensors(other)
        found = made["model.layers.1.mlp.shared_expert.down_proj.weight"]
        assert torch.equal(found, dense(theirs, 1, "down_proj") / 2)
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert config["shared_expert_intermediate_size"] == 24
        assert config["moe_intermediate_size"] == 40
        dense_models.load(tmp_path / "out")


def test_the_plan_says_what_becomes_of_the_layers(tmp_path):
    base = dense_models.saved(tmp_path / "base", "qwen3")
    said = {
        "odd": "8 experts in layer 1 of 3 (qwen3_moe), of which a token passes 2",
        "even": "8 experts in layers 0, 2 of 3 (qwen3_moe), of which a token passes 2",
        "all": "8 experts in every layer (qwen3_moe), of which a token passes 2",
    }
    for word, sentence in said.items():
        assert sentence in plan(recipe({"base": base}, sparse_layers=word)).notes


def test_a_router_of_zeros_is_said_to_choose_the_same_experts(folders):
    notes = plan(recipe(folders, router="zero")).notes
    assert any("every token passes the same 2 of 8" in note for note in notes)


def test_a_model_without_a_config_needs_an_architecture_and_gets_none(folders, tmp_path):
    bare = tmp_path / "bare.safetensors"
    save_file(dense_models.tensors(folders["base"]), bare)
    asked = recipe({"base": bare}, num_experts=2, architecture="mixtral")
    done = merge(asked, tmp_path / "out")
    assert any("has no config.json" in note for note in done.plan.notes)
    base = dense_models.tensors(folders["base"])
    assert_experts(dense_models.tensors(tmp_path / "out"), [base, base])


def test_old_buffers_are_dropped_by_name(tmp_path):
    before = dense_models.saved(tmp_path / "dense", "llama", vocab_size=16)
    held = dense_models.tensors(before)
    for path in (*before.glob("*.safetensors"), *before.glob("*.index.json")):
        path.unlink()
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**held, buffer: torch.ones(4)}, before / "model.safetensors")
    done = merge(recipe({"base": before}, num_experts=2), tmp_path / "out")
    assert buffer not in dense_models.tensors(tmp_path / "out")
    fate = next(f for f in done.plan.fates if f.tensor == buffer)
    assert (fate.what, fate.why) == ("dropped", "every program computes it anew")


def test_another_vocabulary_is_noted_where_only_mlps_are_taken(folders, tmp_path):
    other = dense_models.saved(tmp_path / "other", "llama", 1, vocab_size=50)
    notes = plan(recipe(folders, {"model": str(other)}, "two")).notes
    assert any("[50, 32]" in note and "only its MLPs are taken" in note for note in notes)


def test_the_mean_holds_for_the_mlps_of_dense_layers_too(tmp_path):
    paths = {n: dense_models.saved(tmp_path / n, "qwen3", s) for s, n in enumerate(("a", "b"))}
    asked = recipe(paths, "a", "b", base="a", non_experts="average", sparse_layers=[2])
    merge(asked, tmp_path / "out")
    made, a, b = (dense_models.tensors(tmp_path / n) for n in ("out", "a", "b"))
    for part in PARTS:
        wanted = (dense(a, 0, part) + dense(b, 0, part)) / 2
        assert torch.allclose(dense(made, 0, part), wanted, rtol=0, atol=1e-6)
        name = f"model.layers.2.mlp.experts.1.{part}.weight"
        assert torch.equal(made[name], dense(b, 2, part))
    dense_models.load(tmp_path / "out")
