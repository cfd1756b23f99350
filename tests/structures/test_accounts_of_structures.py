"""What becomes of every input tensor where a model of another structure is built, and why."""

from __future__ import annotations

from collections import Counter

import plain_models
import pytest
import torch

from merge_kit.plan.walk import operands, stored
from tests.toys import plan

LENDS = "the model only lends its files"
EXPERT = """
name: expert
merge_method: linear
parameters: {weight: 0.5}
models: [{model: a}, {model: b}]
---
"""
MIXTURE = """
name: mixture
merge_method: sparse_upcycle
base_model: a
models: [{model: a}, {model: b}]
parameters: {architecture: mixtral}
---
"""
OTHER = MIXTURE.replace("mixture", "other").replace("base_model: a", "base_model: c")
RECIPES = {
    "a stack": "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [1, 3]}]}]",
    "a stack of a stage": EXPERT
    + "merge_method: passthrough\nbase_model: c\n"
    + "slices: [{sources: [{model: expert, layers: [1, 2]}]}]",
    "copies that meet": "merge_method: depth_upscale\nmodels: [{model: a}]\n"
    "parameters: {target_layers: 5}",
    "an upper copy of a stage": EXPERT
    + "merge_method: depth_upscale\nmodels: [{model: c}, {model: expert}]\n"
    + "parameters: {overlap: 2, overlap_mode: sum}",
    "a base that lends files": "merge_method: depth_upscale\nbase_model: c\nmodels: [{model: a}]\n"
    "parameters: {target_layers: 6}",
    "identities": "merge_method: depth_upscale\nmodels: [{model: a}]\n"
    "parameters: {target_layers: 8, block_expansion: true}",
    "an expert of a stage": EXPERT
    + "merge_method: sparse_upcycle\nbase_model: c\nmodels: [{model: expert}, {model: c}]\n"
    + "parameters: {architecture: qwen2_moe, sparse_layers: odd}",
    "an expert of a stack": "name: expert\nmerge_method: passthrough\n"
    "slices: [{sources: [{model: a, layers: [0, 1, 2]}]}, "
    "{sources: [{model: b, layers: [3]}]}]\n---\n"
    "merge_method: sparse_upcycle\nbase_model: c\nmodels: [{model: expert}, {model: c}]\n"
    "parameters: {architecture: mixtral}",
    "one expert back": MIXTURE
    + "merge_method: moe_to_dense\nmodels: [{model: mixture}]\n"
    + "parameters: {architecture: llama, experts: [1]}",
    "matched experts": MIXTURE
    + OTHER
    + "merge_method: match_experts\nbase_model: mixture\nmodels: [{model: other}]",
    "sizes of a stage": EXPERT + "merge_method: pad\nbase_model: expert\nmodels: [{model: c}]",
    "a stage that is cropped": EXPERT
    + "merge_method: crop\nmodels: [{model: expert}]\nparameters: {intermediate_size: 8}",
    "a stage on a basis": EXPERT
    + "merge_method: project\nmodels: [{model: expert}]\nparameters: {hidden_size: 4}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("accounts")
    for seed, name in enumerate("abc"):
        plain_models.write(root / name, "llama", 4, seed, torch.float32)
    return root


def whys(made) -> dict[tuple[str, str], str]:
    """Return why each dropped tensor is dropped, by the model's name and its own."""
    names = {model.key: model.name for model in made.inputs}
    return {(names[f.model], f.tensor): f.why for f in made.fates if f.what == "dropped"}


@pytest.mark.parametrize("name", RECIPES)
def test_each_tensor_has_one_fate_and_what_is_kept_is_what_the_steps_read(folder, name):
    made = plan(RECIPES[name], folder)
    names = {model.key: model.name for model in made.inputs}
    held = len(plain_models.shapes("llama", 4))
    assert Counter(f.model for f in made.fates) == dict.fromkeys(names, held)
    assert len({(f.model, f.tensor) for f in made.fates}) == len(made.fates)
    kept = Counter(names[f.model] for f in made.fates if f.what != "dropped")
    sources = (one for step in made.steps for one in (*operands(step), *step.agree))
    read = {(s.span.path.parent.name, s.span.start) for one in sources for s in stored(one)}
    assert kept == Counter(name for name, _ in read)
    assert all(whys(made).values())


@pytest.mark.parametrize("name", [n for n in RECIPES if n != "a base that lends files"])
def test_only_a_model_that_lends_its_files_is_said_to(folder, name):
    assert LENDS not in whys(plan(RECIPES[name], folder)).values()


def test_a_base_beside_the_copies_lends_its_files(folder):
    assert set(whys(plan(RECIPES["a base that lends files"], folder)).values()) == {LENDS}


def test_a_tensor_of_an_expert_is_left_out_for_what_the_mixture_does_with_it(folder):
    why = whys(plan(RECIPES["an expert of a stage"], folder))
    assert why["a", "model.norm.weight"] == "expert: only the MLPs of experts are taken"
    dense = "expert: layer 2 stays dense, as in input-3:c"
    assert why["b", "model.layers.2.mlp.up_proj.weight"] == dense
    assert ("b", "model.layers.1.mlp.up_proj.weight") not in why


def test_a_tensor_that_a_stage_does_without_is_left_out_there(folder):
    why = whys(plan(RECIPES["an expert of a stack"], folder))
    assert why["a", "model.layers.3.mlp.up_proj.weight"] == "in no slice"
    assert why["b", "model.norm.weight"] == "expert: only the MLPs of experts are taken"


def test_a_stage_that_is_sliced_says_so_of_its_inputs(folder):
    why = whys(plan(RECIPES["a stack of a stage"], folder))
    assert why["a", "model.layers.0.mlp.up_proj.weight"] == "in no slice"
    assert why["c", "model.norm.weight"] == "in no slice"


def test_an_upper_copy_that_is_a_stage_lends_no_embedding(folder):
    why = whys(plan(RECIPES["an upper copy of a stage"], folder))
    assert why["b", "model.embed_tokens.weight"] == "expert: taken from input-3:c, the other copy"


def test_an_expert_that_does_not_come_back_says_so(folder):
    why = whys(plan(RECIPES["one expert back"], folder))
    assert why["a", "model.layers.0.mlp.up_proj.weight"].startswith("mixture: ")


def test_a_stage_that_lends_sizes_says_so_of_its_inputs(folder):
    why = whys(plan(RECIPES["sizes of a stage"], folder))
    assert {one for (model, _), one in why.items() if model in "ab"} == {
        "expert: expert lends its sizes only"
    }
