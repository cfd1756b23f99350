"""What `pad`, `crop` and `project` refuse, and what they say of it."""

from __future__ import annotations

import json

import narrow
import pytest
import torch
from narrow import change
from safetensors.torch import load_file, save_file

from merge_kit.api import merge
from merge_kit.errors import (
    MergeKitError,
    MismatchError,
    NonFiniteError,
    PlanError,
    RecipeError,
    SolveError,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return narrow.save("llama", tmp_path_factory.mktemp("llama") / "llama")


def refused(method, model, tmp_path, **given):
    """Return what is said, on one line."""
    with pytest.raises(MergeKitError) as caught:
        change(method, model, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
    return " ".join(str(caught.value).split())


def edited(model, folder, tensors=None, **config):
    """Return a copy of a model with other values in its config; None takes a key away."""
    folder.mkdir()
    held = load_file(model / "model.safetensors")
    save_file({**held, **(tensors or {})}, folder / "model.safetensors")
    text = {**json.loads((model / "config.json").read_text()), **config}
    text = {key: value for key, value in text.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(text))
    return folder


@pytest.mark.parametrize("size", ["hidden_size", "intermediate_size"])
def test_pad_takes_no_smaller_and_crop_no_larger_size(size, llama, tmp_path):
    assert f"{size} is 8, smaller than" in refused("pad", llama, tmp_path, **{size: 8})
    said = refused("crop", llama, tmp_path, **{size: 96})
    assert f"{size} is 96, larger than" in said
    assert "hint: pad makes it larger" in said


def test_several_problems_come_in_one_list(llama, tmp_path):
    said = refused("crop", llama, tmp_path, hidden_size=96, intermediate_size=96)
    assert "hidden_size is 96" in said
    assert "intermediate_size is 96" in said


def test_groups_of_heads_stay_whole(llama, tmp_path):
    said = refused("pad", llama, tmp_path, num_attention_heads=8)
    assert "8 attention heads and 2 key and value heads are no whole groups" in said
    assert "has 2 heads for each of its 2" in said
    assert "give num_key_value_heads: 4 with it" in said
    said = refused("pad", llama, tmp_path, num_key_value_heads=3)
    assert "give num_attention_heads: 6 with it" in said


def test_a_llama_of_a_hidden_size_that_readers_refuse(llama, tmp_path):
    said = refused("pad", llama, tmp_path, hidden_size=50)
    assert "hidden_size 50 is not divisible by 4 attention heads" in said


@pytest.mark.parametrize("value", [0, -4])
def test_a_size_below_one(value, llama, tmp_path):
    said = refused("pad", llama, tmp_path, hidden_size=value)
    assert f"hidden_size is {value}, expected at least 1" in said


def test_no_size_at_all(llama, tmp_path):
    assert "pad has no size to reach" in refused("pad", llama, tmp_path)
    assert "crop has no size to reach" in refused("crop", llama, tmp_path)


def test_head_dim_is_no_parameter_and_cannot_come_from_another_model(llama, tmp_path):
    with pytest.raises(RecipeError, match="has no parameter 'head_dim'"):
        change("pad", llama, tmp_path / "out", head_dim=16)
    like = narrow.save("llama", tmp_path / "like", hidden_size=64)
    said = refused("pad", llama, tmp_path, like=like)
    assert "has a head_dim of 8" in said
    assert "of 16; it cannot change: the frequencies of positions" in said


def test_an_architecture_of_which_nothing_is_known(llama, tmp_path):
    model = edited(llama, tmp_path / "model", model_type="mamba")
    said = refused("pad", model, tmp_path, hidden_size=64)
    assert "the axes of model_type 'mamba' are not known, expected one of llama, mistral" in said
    model = edited(llama, tmp_path / "misspelt", model_type="lama")
    assert "did you mean 'llama'?" in refused("pad", model, tmp_path, hidden_size=64)


def test_a_model_without_a_config(llama, tmp_path):
    said = refused("pad", llama / "model.safetensors", tmp_path, hidden_size=64)
    assert "has no config.json, which says what its axes are" in said


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_size", None, "hidden_size is missing"),
        ("num_attention_heads", None, "num_attention_heads is missing"),
        ("intermediate_size", [48, 48], "intermediate_size is [48, 48], expected a whole number"),
        ("hidden_size", "32", "hidden_size is 32, expected a whole number above 0"),
        ("num_key_value_heads", 0, "num_key_value_heads is 0, expected a whole number"),
    ],
)
def test_a_config_that_does_not_tell_sizes(key, value, said, llama, tmp_path):
    model = edited(llama, tmp_path / "model", **{key: value})
    assert said in refused("pad", model, tmp_path, intermediate_size=64)


def test_tensors_that_cannot_be_placed_are_named(llama, tmp_path):
    model = edited(llama, tmp_path / "model", {"model.layers.0.adapter.weight": torch.ones(3)})
    said = refused("pad", model, tmp_path, hidden_size=64)
    assert "model.layers.0.adapter.weight: is no tensor whose axes are known" in said


def test_weights_of_another_size_than_the_config(llama, tmp_path):
    model = edited(llama, tmp_path / "model", intermediate_size=40)
    said = refused("pad", model, tmp_path, hidden_size=64)
    assert "model.layers.0.mlp.up_proj.weight: has shape [48, 32], expected [40, 32]" in said
    assert "more tensors do not fit either" in said


def test_a_fused_axis_of_another_number_of_axes(llama, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    model = edited(llama, tmp_path / "model", {name: torch.ones(48, 32, 1)})
    assert f"{name}: has shape [48, 32, 1]" in refused("pad", model, tmp_path, hidden_size=64)


@pytest.mark.parametrize(
    ("kind", "size", "why"),
    [
        ("gemma", "hidden_size", "multiplies embeddings by the square root of hidden_size"),
        ("gemma", "num_attention_heads", "only intermediate_size can change"),
        ("gpt2", "hidden_size", "LayerNorms subtract the mean"),
        ("gpt_neox", "hidden_size", "LayerNorms subtract the mean"),
        ("gpt_neox", "num_attention_heads", "number of heads times head_dim"),
    ],
)
def test_sizes_that_an_architecture_cannot_change(kind, size, why, tmp_path):
    model = narrow.save(kind, tmp_path / "model")
    assert why in refused("pad", model, tmp_path, **{size: 64})


def test_layer_norms_cannot_be_projected(tmp_path):
    model = narrow.save("gpt_neox", tmp_path / "model")
    said = refused("project", model, tmp_path, intermediate_size=64)
    assert "cannot be projected: its LayerNorms subtract the mean" in said


def test_experts_have_an_intermediate_size_of_their_own(tmp_path):
    model = narrow.save("qwen3_moe", tmp_path / "model", mlp_only_layers=[])
    said = refused("pad", model, tmp_path, intermediate_size=72)
    assert "has an intermediate_size" in said
    assert "moe_intermediate_size" in said


def test_only_one_model(llama, tmp_path):
    other = narrow.save("llama", tmp_path / "other", 2)
    recipe = {
        "merge_method": "pad",
        "models": [{"model": str(llama)}, {"model": str(other)}],
        "parameters": {"hidden_size": 64},
    }
    with pytest.raises(PlanError, match="pad takes one model under models:, found 2"):
        merge(recipe, tmp_path / "out")


def test_a_model_without_a_head_cannot_be_projected(llama, tmp_path):
    model = edited(llama, tmp_path / "model", architectures=["LlamaModel"])
    held = load_file(llama / "model.safetensors")
    del held["lm_head.weight"]
    save_file(held, model / "model.safetensors")
    said = refused("project", model, tmp_path, hidden_size=64)
    assert "LlamaModel has no head" in said


def basis(tmp_path, *matrices, dtype=None):
    path = tmp_path / "basis.safetensors"
    save_file({f"m{i}": m.contiguous() for i, m in enumerate(matrices)}, path)
    return str(path)


@pytest.mark.parametrize(
    ("matrix", "hidden", "said"),
    [
        (torch.eye(32)[:, :30], None, "has shape [32, 30], expected [any, 32]"),
        (torch.eye(32)[:20], 24, "has shape [20, 32], expected [24, 32]"),
        (torch.ones(32), None, "has shape [32], expected [any, 32]"),
        (torch.ones(0, 32), None, "has shape [0, 32], expected [any, 32]"),
        (torch.ones(20, 32, dtype=torch.int64), None, "is I64, expected floats"),
    ],
)
def test_a_basis_of_another_shape_is_refused_by_the_plan(matrix, hidden, said, llama, tmp_path):
    sizes = {} if hidden is None else {"hidden_size": hidden}
    assert said in refused("project", llama, tmp_path, basis=basis(tmp_path, matrix), **sizes)


def test_the_file_of_a_basis(llama, tmp_path):
    text = basis(tmp_path, torch.eye(32), torch.eye(32))
    assert "is one of 2 tensors: m0, m1" in refused("project", llama, tmp_path, basis=text)
    said = refused("project", llama, tmp_path, basis=f"{text}:m2")
    assert "there is no tensor 'm2' in the file of the basis; it holds m0, m1" in said
    assert "no folder or file" in refused("project", llama, tmp_path, basis="nowhere.safetensors")
    assert "expected svd or a path" in refused("project", llama, tmp_path, basis=" ")


def values(matrix, at=None, value=float("nan")):
    made = matrix.clone()
    if at is not None:
        made[at] = value
    return made


@pytest.mark.parametrize(
    ("matrix", "kind", "said"),
    [
        (values(torch.eye(32), (3, 4)), NonFiniteError, "the basis holds NaN or infinity"),
        (values(torch.eye(32), (3, 4), torch.inf), NonFiniteError, "holds NaN or infinity"),
        (values(torch.eye(32), (5, 5), 0.0), SolveError, "has rank 31, expected 32"),
        (torch.zeros(20, 32), SolveError, "has rank 0, expected 20"),
        (torch.ones(20, 32), SolveError, "has rank 1, expected 20"),
    ],
)
def test_values_of_a_basis_are_looked_at_by_the_run(matrix, kind, said, llama, tmp_path):
    with pytest.raises(kind) as caught:
        change("project", llama, tmp_path / "out", basis=basis(tmp_path, matrix))
    assert said in str(caught.value)


def test_embeddings_that_are_not_finite_have_no_basis(llama, tmp_path):
    embeddings = load_file(llama / "model.safetensors")["model.embed_tokens.weight"]
    broken = {"model.embed_tokens.weight": values(embeddings, (1, 1))}
    model = edited(llama, tmp_path / "model", broken)
    with pytest.raises(NonFiniteError, match=r"embed_tokens\.weight: holds NaN or infinity"):
        change("project", model, tmp_path / "out", hidden_size=20)


def test_quantised_weights_are_refused(llama, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    model = edited(llama, tmp_path / "model", {name: torch.ones(48, 32, dtype=torch.int8)})
    with pytest.raises(MismatchError, match="is I8, and its size changes: expected floats"):
        change("pad", model, tmp_path / "out", intermediate_size=64)


LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize("sizes", [{"hidden_size": 48}, {"num_attention_heads": 8}])
def test_a_phi3_of_long_positions_keeps_its_width_for_each_head(sizes, tmp_path):
    phi3 = narrow.save("phi3", tmp_path / "phi3", rope_parameters=LONG)
    if "num_attention_heads" in sizes:
        sizes = sizes | {"num_key_value_heads": 4}
    said = refused("pad", phi3, tmp_path, **sizes)
    assert "rope_scaling has a factor for each of the frequencies" in said
    assert "in place of 8" in said


def test_a_phi3_of_long_positions_grows_in_proportion(tmp_path):
    phi3 = narrow.save("phi3", tmp_path / "phi3", rope_parameters=LONG)
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    change("pad", phi3, tmp_path / "out", **sizes)
    before, after = narrow.load("phi3", phi3), narrow.load("phi3", tmp_path / "out")
    assert torch.allclose(narrow.logits(before), narrow.logits(after), atol=1e-5)
