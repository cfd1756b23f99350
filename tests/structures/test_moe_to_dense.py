"""moe_to_dense: an expert or a mean of experts as the MLP of a dense model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from merge_kit.api import merge
from merge_kit.errors import MergeKitError, MismatchError, PlanError, RecipeError
from tests.models import stored
from tests.structures import mixtures
from tests.toys import plan

KINDS = ("mixtral", "qwen2_moe", "qwen3_moe")
DENSE = {"mixtral": "mistral", "qwen2_moe": "qwen2", "qwen3_moe": "qwen3"}
ROLES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixtures")
    for kind in KINDS:
        mixtures.save(mixtures.build(kind), folder / kind)
        mixtures.save(mixtures.build(kind), folder / f"{kind}-bf16", torch.bfloat16)
    mixtures.fused(folder / "qwen3_moe", folder / "fused")
    return folder


def dense(model: Path, out: Path, **parameters) -> Path:
    recipe = {"merge_method": "moe_to_dense", "models": [{"model": str(model)}]}
    merge({**recipe, "parameters": parameters} if parameters else recipe, out)
    return out


def refused(model: Path, **parameters) -> MergeKitError:
    recipe = {"merge_method": "moe_to_dense", "base_model": str(model), "parameters": parameters}
    with pytest.raises(MergeKitError) as caught:
        plan(json.dumps(recipe), model.parent)
    return caught.value


def expert(kind: str, layer: int, number: int, role: str) -> str:
    if kind == "mixtral":
        return f"model.layers.{layer}.block_sparse_moe.experts.{number}.{ROLES[role]}.weight"
    return f"model.layers.{layer}.mlp.experts.{number}.{role}.weight"


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_an_expert_answer_as_the_dense_model_does(kind, tmp_path):
    model = mixtures.alike(mixtures.build(kind))
    for layer in model.model.layers if kind == "qwen2_moe" else ():
        torch.nn.init.zeros_(layer.mlp.shared_expert.down_proj.weight)
    folder = dense(mixtures.save(model, tmp_path / "moe"), tmp_path / "out")
    loaded = mixtures.load(folder)
    assert loaded.config.model_type == DENSE[kind]
    assert torch.allclose(mixtures.logits(loaded), mixtures.logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["", "-bf16"])
def test_one_expert_is_taken_bit_for_bit(kind, end, saved, tmp_path):
    found = stored(dense(saved / (kind + end), tmp_path / "out", experts=2))
    source = stored(saved / (kind + end))
    for layer in range(2):
        for role in ROLES:
            name = f"model.layers.{layer}.mlp.{role}.weight"
            assert torch.equal(found.pop(name), source[expert(kind, layer, 2, role)])
    assert all(torch.equal(tensor, source[name]) for name, tensor in found.items())
    assert not any("expert" in name or "mlp" in name for name in found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("end", "dtype", "half"), [("", torch.float32, 2.0**-24), ("-bf16", torch.bfloat16, 2.0**-8)]
)
@pytest.mark.parametrize(
    ("given", "taken"), [([0, 2], (0, 2)), (None, (0, 1, 2)), ("all", (0, 1, 2))]
)
def test_a_mean_is_rounded_once_from_float64(kind, end, dtype, half, given, taken, saved, tmp_path):
    more = {} if given is None else {"experts": given}
    found = stored(dense(saved / (kind + end), tmp_path / "out", **more))
    source = stored(saved / (kind + end))
    for role in ROLES:
        rows = [source[expert(kind, 1, e, role)].double().numpy() for e in taken]
        mean = torch.from_numpy(np.mean(rows, axis=0))
        tensor = found[f"model.layers.1.mlp.{role}.weight"]
        assert tensor.dtype == dtype
        error = (tensor.double() - mean).abs()
        wide = 2.0**-50  # of the sums in float64, here and there
        assert bool((error <= (half + wide) * mean.abs()).all())


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_of_copies_is_the_copy_bit_for_bit(kind, tmp_path):
    model = mixtures.alike(mixtures.build(kind))
    source = mixtures.save(model, tmp_path / "moe")
    one = stored(dense(source, tmp_path / "one", experts=1))
    every = stored(dense(source, tmp_path / "every"))
    assert one.keys() == every.keys()
    assert all(torch.equal(one[name], every[name]) for name in one)


def test_fused_experts_give_the_same_as_split_ones(saved, tmp_path):
    for i, experts in enumerate([1, [0, 2], "all"]):
        one = stored(dense(saved / "qwen3_moe", tmp_path / f"a{i}", experts=experts))
        two = stored(dense(saved / "fused", tmp_path / f"b{i}", experts=experts))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_shared_expert_may_become_the_mlp(saved, tmp_path):
    found = stored(dense(saved / "qwen2_moe", tmp_path / "out", experts="shared"))
    source = stored(saved / "qwen2_moe")
    for role in ROLES:
        name = f"model.layers.0.mlp.{role}.weight"
        assert torch.equal(found[name], source[f"model.layers.0.mlp.shared_expert.{role}.weight"])
    mixtures.load(tmp_path / "out")


def test_the_shared_expert_has_the_width_that_its_config_says(tmp_path):
    model = mixtures.build("qwen2_moe", shared_expert_intermediate_size=36)
    source = mixtures.save(model, tmp_path / "moe")
    assert (
        mixtures.load(dense(source, tmp_path / "a", experts="shared")).config.intermediate_size
        == 36
    )
    assert mixtures.load(dense(source, tmp_path / "b")).config.intermediate_size == 24


def test_a_shared_expert_must_be_there(saved):
    error = refused(saved / "qwen3_moe", experts="shared")
    assert "model.layers.0.mlp has no shared expert" in str(error)


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_moe"])
def test_layers_that_are_dense_keep_their_mlp(kind, tmp_path):
    model = mixtures.build(kind, mlp_only_layers=[1], intermediate_size=24)
    source = mixtures.save(mixtures.alike(model), tmp_path / "moe")
    folder = dense(source, tmp_path / "out", experts=0)
    own, made = stored(source), stored(folder)
    for role in ROLES:
        name = f"model.layers.1.mlp.{role}.weight"
        assert torch.equal(own[name], made[name])
    loaded = mixtures.load(folder)
    if kind == "qwen3_moe":  # of qwen2_moe, the shared expert is dropped
        assert torch.allclose(mixtures.logits(loaded), mixtures.logits(model), rtol=0, atol=1e-5)


def test_dense_layers_of_another_width_are_refused_by_name(tmp_path):
    source = mixtures.save(mixtures.build("qwen3_moe", decoder_sparse_step=2), tmp_path / "moe")
    error = refused(source)
    assert isinstance(error, MismatchError)
    assert "model.layers.1.mlp.gate_proj.weight has 24" in str(error)
    assert "model.layers.0.mlp.gate_proj.weight 40" in str(error)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_a_sliding_window_stays_as_it_was(kind, tmp_path):
    window = {"sliding_window": 4}
    if kind != "mixtral":
        window |= {"use_sliding_window": True, "max_window_layers": 1}
    model = mixtures.alike(mixtures.build(kind, **window))
    for layer in model.model.layers if kind == "qwen2_moe" else ():
        torch.nn.init.zeros_(layer.mlp.shared_expert.down_proj.weight)
    source = mixtures.save(model, tmp_path / "moe")
    if kind == "qwen2_moe":  # older files have no list of layers
        text = json.loads((source / "config.json").read_text())
        del text["layer_types"]
        (source / "config.json").write_text(json.dumps(text))
        model = mixtures.load(source)
    loaded = mixtures.load(dense(source, tmp_path / "out"))
    loaded.set_attn_implementation("eager")
    model.set_attn_implementation("eager")
    assert torch.allclose(mixtures.logits(loaded), mixtures.logits(model), rtol=0, atol=1e-5)


def test_mixtral_may_become_llama(tmp_path):
    model = mixtures.alike(mixtures.build("mixtral"))
    folder = dense(mixtures.save(model, tmp_path / "moe"), tmp_path / "out", architecture="llama")
    loaded = mixtures.load(folder)
    assert loaded.config.model_type == "llama"
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert torch.allclose(mixtures.logits(loaded), mixtures.logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_config_leaves_out_is_what_the_sparse_class_takes(kind, tmp_path):
    model = mixtures.alike(mixtures.build(kind, num_attention_heads=4, num_key_value_heads=4))
    for layer in model.model.layers if kind == "qwen2_moe" else ():
        torch.nn.init.zeros_(layer.mlp.shared_expert.down_proj.weight)
    source = mixtures.save(model, tmp_path / "moe")
    text = json.loads((source / "config.json").read_text())
    for key in ("rms_norm_eps", "rope_parameters", "rope_theta", "sliding_window"):
        text.pop(key, None)
    (source / "config.json").write_text(json.dumps(text))
    sparse = mixtures.load(source)
    loaded = mixtures.load(dense(source, tmp_path / "out"))
    assert torch.allclose(mixtures.logits(loaded), mixtures.logits(sparse), rtol=0, atol=1e-5)


def test_every_tensor_is_accounted_for(saved):
    recipe = {
        "merge_method": "moe_to_dense",
        "models": [{"model": "qwen2_moe"}],
        "parameters": {"experts": [0, 2]},
    }
    made = plan(json.dumps(recipe), saved)
    fates = {fate.tensor: fate for fate in made.fates}
    block = "model.layers.0.mlp"
    assert fates[f"{block}.experts.0.up_proj.weight"].what == "merged"
    assert fates[f"{block}.experts.1.up_proj.weight"].why == "expert 1 is not taken"
    assert fates[f"{block}.gate.weight"].why == "a dense layer has no router"
    assert fates[f"{block}.shared_expert_gate.weight"].why == "the shared expert is not taken"
    assert fates["model.norm.weight"].what == "copied"
    assert "mean of experts 0, 2 of 2 layers, as qwen2" in made.notes


def test_the_dtype_that_is_named_is_written(saved, tmp_path):
    recipe = {
        "merge_method": "moe_to_dense",
        "models": [{"model": str(saved / "mixtral")}],
        "out_dtype": "float16",
    }
    merge(recipe, tmp_path / "out", shard_size=3000)
    assert {tensor.dtype for tensor in stored(tmp_path / "out").values()} == {torch.float16}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_the_result_is_a_model_for_other_documents(saved, tmp_path):
    back = {"merge_method": "moe_to_dense", "models": [{"model": str(saved / "mixtral")}]}
    documents = [{"name": f"of-{e}", **back, "parameters": {"experts": e}} for e in (0, 1, 2)]
    last = {
        "merge_method": "linear",
        "models": [{"model": f"of-{e}", "parameters": {"weight": 1}} for e in (0, 1, 2)],
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("\n---\n".join(json.dumps(one) for one in (*documents, last)))
    merge(recipe, tmp_path / "out")
    found, source = stored(tmp_path / "out"), stored(saved / "mixtral")
    rows = [source[expert("mixtral", 0, e, "up_proj")].double() for e in range(3)]
    mean = found["model.layers.0.mlp.up_proj.weight"].double()
    bound = 2.0**-22 * sum(row.abs() for row in rows) / 3  # float32 sums: the measure of linear
    assert bool(((mean - sum(rows) / 3).abs() <= bound).all())
    mixtures.load(tmp_path / "out")


def test_a_model_without_a_config_needs_an_architecture(tmp_path):
    lead = "model.layers.0.block_sparse_moe"
    tensors = mixtures.split_experts(1, 2, ("w1", "w2", "w3"), (4, 4), f"{lead}.experts")
    model = mixtures.bare(tmp_path / "bare", {**tensors, f"{lead}.gate.weight": torch.ones(2, 4)})
    assert "no config.json" in str(refused(model))
    out = dense(model, tmp_path / "out", architecture="mistral", experts=1)
    found = stored(out)
    assert set(found) == {f"model.layers.0.mlp.{role}.weight" for role in ROLES}
    assert torch.equal(
        found["model.layers.0.mlp.up_proj.weight"], tensors[f"{lead}.experts.1.w3.weight"]
    )
    assert not (out / "config.json").exists()


@pytest.mark.parametrize(
    ("parameters", "kind", "problem"),
    [
        ({"experts": 3}, PlanError, "experts names 3, and .* holds 3"),
        ({"experts": [0, 0]}, RecipeError, "names 0 twice"),
        ({"experts": "none"}, RecipeError, "expected a number, a list of numbers, all or shared"),
        ({"architecture": "qwen2"}, PlanError, "layers of mixtral are those of mistral or llama"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters, kind, problem, saved):
    error = refused(saved / "mixtral", **parameters)
    assert isinstance(error, kind)
    with pytest.raises(kind, match=problem):
        raise error


def test_a_dense_model_has_no_experts(tmp_path):
    model = mixtures.bare(tmp_path / "a", {"model.layers.0.x": torch.ones(2)}, vocab_size=2)
    assert "has no experts" in str(refused(model))


def test_a_class_without_a_dense_twin_is_named(tmp_path):
    lead = "model.layers.0.mlp.experts"
    tensors = mixtures.split_experts(1, 2, ("up_proj",), (4, 4), lead)
    model = mixtures.bare(tmp_path / "a", tensors, model_type="olmoe")
    assert "no dense class is known for model_type 'olmoe'" in str(refused(model))


def test_what_a_dense_layer_has_no_place_for_is_named(saved, tmp_path):
    tensors = stored(saved / "mixtral")
    tensors["model.layers.1.block_sparse_moe.odd.weight"] = torch.ones(5)
    text = json.loads((saved / "mixtral" / "config.json").read_text())
    model = mixtures.bare(tmp_path / "odd", tensors, **text)
    error = refused(model)
    assert "model.layers.1.block_sparse_moe.odd.weight" in error.where
    assert "no place" in error.problem


def test_one_model_is_taken(saved):
    recipe = {
        "merge_method": "moe_to_dense",
        "models": [{"model": "mixtral"}, {"model": "qwen2_moe"}],
    }
    with pytest.raises(PlanError, match="takes one model, found 2: mixtral, qwen2_moe"):
        plan(json.dumps(recipe), saved)


DENSE_CLASSES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


@pytest.mark.parametrize("kind", DENSE_CLASSES)
def test_upcycled_and_taken_back_a_model_is_what_it_was(kind, tmp_path):
    more = {"head_dim": 8} if kind == "qwen3" else {}
    sizes = {**mixtures.SMALL, "intermediate_size": 24, **more}
    model = transformers.AutoModelForCausalLM.from_config(DENSE_CLASSES[kind](**sizes))
    model.save_pretrained(tmp_path / "dense")
    up = {"merge_method": "sparse_upcycle", "base_model": str(tmp_path / "dense")}
    merge({**up, "parameters": {"num_experts": 3}}, tmp_path / "sparse")
    named = {"architecture": "llama"} if kind == "llama" else {}
    back = stored(dense(tmp_path / "sparse", tmp_path / "back", **named))
    own = stored(tmp_path / "dense")
    assert back.keys() == own.keys()
    assert all(torch.equal(back[name], own[name]) for name in own)
    one, other = (mixtures.load(tmp_path / name).config.to_dict() for name in ("dense", "back"))
    del one["_name_or_path"], other["_name_or_path"]
    assert one == other


def test_a_llama_that_became_a_qwen2_moe_comes_back_as_a_qwen2(tmp_path):
    config = transformers.LlamaConfig(**mixtures.SMALL, intermediate_size=24)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "dense")
    up = {"merge_method": "sparse_upcycle", "base_model": str(tmp_path / "dense")}
    merge({**up, "parameters": {"architecture": "qwen2_moe"}}, tmp_path / "sparse")
    found = mixtures.load(dense(tmp_path / "sparse", tmp_path / "back"))
    assert found.config.model_type == "qwen2"  # its biases are zeros
    assert torch.allclose(mixtures.logits(found), mixtures.logits(model), rtol=0, atol=1e-5)


def test_a_layer_with_experts_and_an_mlp_is_refused(saved, tmp_path):
    tensors = stored(saved / "mixtral")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(24, 16)
    text = json.loads((saved / "mixtral" / "config.json").read_text())
    error = refused(mixtures.bare(tmp_path / "odd", tensors, **text))
    assert "experts and another MLP would both become model.layers.1.mlp" in str(error)
