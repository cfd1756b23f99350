"""Quantised models become no experts; a layer with a hole is spoken of wherever it is taken."""

from __future__ import annotations

import json

import plain_models
import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_kit.errors import MergeKitError
from tests.toys import OUTSIDE, SUFFIXES, config, plan, write


def changed(root, name, tensors=None, **more):
    """Write a Llama whose tensors and config are other ones in part."""
    plain_models.write(root / name, "llama", 2, 0, torch.float32)
    path = root / name / "model.safetensors"
    save_file(load_file(path) | (tensors or {}), path, {"format": "pt"})
    text = json.loads((root / name / "config.json").read_text(encoding="utf-8"))
    (root / name / "config.json").write_text(json.dumps(text | more), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantised")
    plain_models.write(root / "a", "llama", 2, 1, torch.float32)
    changed(root, "bnb", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    down = "model.layers.1.mlp.down_proj.weight"
    changed(root, "int8", {down: torch.zeros(8, 12, dtype=torch.int8)})
    changed(root, "packed", {down: torch.zeros(2, 12, dtype=torch.int32)})
    changed(root, "fp8", {down: torch.zeros(8, 12, dtype=torch.float8_e4m3fn)})
    return root


def recipe(base, *models):
    listed = ", ".join(f"{{model: {name}}}" for name in models)
    return f"merge_method: sparse_upcycle\nbase_model: {base}\n" + (
        f"models: [{listed}]\n" if models else ""
    )


@pytest.mark.parametrize("text", [recipe("{}"), recipe("a", "a", "{}"), recipe("{}", "a", "a")])
def test_a_quantised_model_becomes_no_expert_and_no_base(text, folder):
    with pytest.raises(MergeKitError) as caught:
        plan(text.replace("{}", "bnb", 1) if "{}" in text else text, folder)
    assert "the model is quantised with bitsandbytes (8 bits)" in str(caught.value)
    assert "bnb" in caught.value.where
    assert "quantise the result" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "dtype"), [("int8", "is I8"), ("packed", "is I32"), ("fp8", "F8_E4M3 tensors")]
)
@pytest.mark.parametrize("models", [(), ("a", "{}")])
def test_projections_that_are_no_floats_are_named(name, dtype, models, folder):
    used = [name if one == "{}" else one for one in models]
    with pytest.raises(MergeKitError) as caught:
        plan(recipe("a" if models else name, *used), folder)
    assert dtype in str(caught.value)
    assert name in caught.value.where


def holed(folder, lacking, layers=4):
    """Write a toy model without these tensors, (layer, suffix)."""
    tensors = {name: torch.zeros(4) for name in OUTSIDE}
    for i in range(layers):
        held = [suffix for suffix in SUFFIXES if (i, suffix) not in lacking]
        tensors |= {f"model.layers.{i}.{suffix}": torch.zeros(4) for suffix in held}
    return write(folder, tensors, config(layers))


def said(text, folder):
    return [note for note in plan(text, folder).notes if "random numbers" in note]


STACK = "merge_method: passthrough\nslices:\n  - sources: [{model: x, layer_range: [0, 4]}]\n"
STACK += "  - sources: [{model: x, layer_range: [1, 4]}]\n"
DEPTH = "merge_method: depth_upscale\nmodels: [{model: x}]\nparameters: {overlap: 1}\n"


@pytest.mark.parametrize("text", [STACK, DEPTH])
def test_a_layer_that_alone_lacks_a_tensor_is_named_once(text, tmp_path):
    holed(tmp_path / "x", {(2, "mlp.up_proj.weight")})
    (note,) = said(text, tmp_path)
    assert note.startswith("layer 2 of input-1:x lacks mlp.up_proj.weight, which every other layer")


def test_a_whole_model_and_one_that_differs_in_several_layers_are_not_spoken_of(tmp_path):
    holed(tmp_path / "x", set())
    assert said(STACK, tmp_path) == []
    holed(tmp_path / "two" / "x", {(i, "mlp.up_proj.weight") for i in (1, 3)})
    assert said(STACK, tmp_path / "two") == []


def test_a_layer_that_is_not_taken_is_not_spoken_of(tmp_path):
    holed(tmp_path / "x", {(2, "mlp.up_proj.weight")})
    text = "merge_method: passthrough\nslices:\n  - sources: [{model: x, layer_range: [0, 2]}]\n"
    assert said(text, tmp_path) == []


def test_a_layer_of_another_kind_lacks_nothing(tmp_path):
    folder = holed(tmp_path / "x", {(2, "mlp.up_proj.weight")})
    path = folder / "model.safetensors"
    more = {"model.layers.2.mlp.experts.0.w1.weight": torch.zeros(4)}
    save_file(load_file(path) | more, path)
    assert said(STACK, tmp_path) == []
