"""No file of an output says where on the disk a recipe found its models, bases and adapters."""

from __future__ import annotations

import json

import plain_models
import pytest
import torch
from safetensors.torch import save_file

from merge_kit.api import merge
from merge_kit.publish.manifest import read_manifest
from merge_kit.publish.recipes import recipe_hash

RECIPES = {
    "stack": "merge_method: passthrough\nbase_model: {a}\n"
    "slices: [{{sources: [{{model: {a}, layer_range: [0, 2]}}]}}]\n",
    "depth": "merge_method: depth_upscale\nmodels: [{{model: {a}}}, {{model: {b}}}]\n"
    "parameters: {{overlap: 1, overlap_mode: sum}}\n",
    "experts": "merge_method: sparse_upcycle\nbase_model: {a}\n"
    "models: [{{model: {a}}}, {{model: {b}}}]\nparameters: {{architecture: mixtral}}\n",
    "experts with an adapter": "merge_method: sparse_upcycle\nbase_model: {a}\n"
    "models: [{{model: {a}+{lora}}}, {{model: {{model: {{path: {b}}}, lora: [{lora}]}}}}]\n"
    "parameters: {{architecture: mixtral}}\n",
    "shared expert": "merge_method: sparse_upcycle\nbase_model: {q}\n"
    "models: [{{model: {q}}}, {{model: {q}}}]\nshared_experts: [{{model: {q}}}]\n",
    "of mergekit-moe": "base_model: {q}\ngate_mode: random\n"
    "experts: [{{source_model: {q}}}, {{source_model: {q}, positive_prompts: [a]}}]\n"
    "shared_experts: [{{source_model: {q}}}]\narchitecture: Qwen MoE\n",
    "back": "name: mixture\nmerge_method: sparse_upcycle\nbase_model: {a}\n"
    "parameters: {{num_experts: 2, architecture: mixtral}}\n---\n"
    "merge_method: moe_to_dense\nbase_model: mixture\n"
    "parameters: {{architecture: llama}}\n",
    "matched": "name: m\nmerge_method: sparse_upcycle\nbase_model: {a}\n"
    "models: [{{model: {a}}}, {{model: {b}}}]\nparameters: {{architecture: mixtral}}\n---\n"
    "name: n\nmerge_method: sparse_upcycle\nbase_model: {a}\n"
    "models: [{{model: {b}}}, {{model: {a}}}]\nparameters: {{architecture: mixtral}}\n---\n"
    "merge_method: match_experts\nbase_model: m\nmodels: [{{model: n}}]\n",
    "padded": "merge_method: pad\nbase_model: {b}\nmodels: [{{model: {a}}}]\n",
    "cropped": "merge_method: crop\nmodels: [{{model: {a}}}]\n"
    "parameters: {{intermediate_size: 8}}\n",
    "basis": "merge_method: project\nmodels: [{{model: {a}}}]\nparameters: {{basis: {one}}}\n",
    "basis in quotes": "merge_method: project\nmodels: [{{model: '{a}'}}]\n"
    "parameters: {{basis: '{one}', hidden_size: 4}}\n",
    "one basis of a file": "merge_method: project\nmodels: [{{model: {a}}}]\n"
    "parameters: {{basis: '{two}:turn'}}\n",
    "a basis by a rule": "merge_method: project\nmodels: [{{model: {a}}}]\n"
    "parameters: {{basis: [{{value: '{two}:turn'}}]}}\n",
    "svd": "merge_method: project\nmodels: [{{model: {a}}}]\n"
    "parameters: {{basis: svd, hidden_size: 4}}\n",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("hidden-place")
    for seed, (name, kind) in enumerate({"a": "llama", "b": "llama", "q": "qwen2"}.items()):
        plain_models.write(root / name, kind, 2, seed, torch.float32)
    generator = torch.Generator().manual_seed(3)
    turn, _ = torch.linalg.qr(torch.randn(8, 4, generator=generator))
    save_file({"turn": turn.T.contiguous()}, root / "one.safetensors")
    save_file({"turn": turn.T.contiguous(), "x": torch.ones(1)}, root / "two.safetensors")
    (root / "lora").mkdir()
    lead = "base_model.model.model.layers.0.mlp.up_proj"
    pair = {f"{lead}.lora_A.weight": torch.ones(2, 8), f"{lead}.lora_B.weight": torch.ones(12, 2)}
    save_file(pair, root / "lora" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}
    (root / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    files = {name: root / f"{name}.safetensors" for name in ("one", "two")}
    return {name: root / name for name in ("a", "b", "q", "lora")} | files


@pytest.mark.parametrize("name", RECIPES)
def test_no_file_of_an_output_names_the_folder_of_its_inputs(places, tmp_path, name):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPES[name].format(**places))
    out = merge(recipe, tmp_path / "out").output
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {"README.md", "merge_kit.json"} <= {path.name for path in files}
    for path in files:
        raw = path.read_bytes()
        assert b"hidden-place" not in raw, path.name
        assert str(tmp_path).encode() not in raw, path.name
    record = read_manifest(out)
    assert recipe_hash(recipe.read_text()) == recipe_hash(record.recipe) == record.recipe_hash


def test_a_basis_is_shown_by_its_file_and_tensor(places, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPES["one basis of a file"].format(**places))
    assert "numbers-1:two:turn" in read_manifest(merge(recipe, tmp_path / "out").output).recipe
    recipe.write_text(RECIPES["svd"].format(**places))
    assert "basis: svd" in read_manifest(merge(recipe, tmp_path / "svd").output).recipe
