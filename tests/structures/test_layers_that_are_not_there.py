"""Layers that a checkpoint should have and has not: no stack and no mixture leaves them empty."""

from __future__ import annotations

import json
import shutil

import plain_models
import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_kit.api import merge
from merge_kit.errors import MergeKitError, MismatchError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and the same without its layer 1, without its last layer, of another config."""
    root = tmp_path_factory.mktemp("absent")
    plain_models.write(root / "whole", "llama", 4, 0, torch.float32)
    for name, layer in (("gap", 1), ("short", 3)):
        shutil.copytree(root / "whole", root / name)
        path = root / name / "model.safetensors"
        held = {k: v for k, v in load_file(path).items() if f"layers.{layer}." not in k}
        save_file(held, path, {"format": "pt"})
    for name, layers in (("fewer", 3), ("more", 6)):
        path = shutil.copytree(root / "whole", root / name) / "config.json"
        text = json.loads(path.read_text(encoding="utf-8")) | {"num_hidden_layers": layers}
        path.write_text(json.dumps(text), encoding="utf-8")
    return root


def refused(recipe, folder):
    with pytest.raises(MergeKitError) as caught:
        merge(recipe, folder / "out")
    assert not (folder / "out").exists()
    return caught.value


def stack(*spans):
    return {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": m, "layer_range": span}]} for m, span in spans],
    }


def deeper(model, **parameters):
    model = [{"model": model}]
    return {"merge_method": "depth_upscale", "models": model, "parameters": parameters}


@pytest.mark.parametrize(
    "recipe",
    [
        lambda at: stack((at, [0, 3]), (at, [2, 4])),
        lambda at: deeper(at, overlap=1),
        lambda at: deeper(at, target_layers=6, block_expansion=True),
    ],
    ids=["stack", "drop", "expansion"],
)
def test_a_layer_without_tensors_is_taken_nowhere(recipe, folder):
    error = refused(recipe(str(folder / "gap")), folder)
    assert isinstance(error, MismatchError)
    assert "layer 1 of input-1:gap has no tensors" in error.problem
    assert "download complete" in error.hint


def test_the_other_layers_of_such_a_model_can_be_stacked(folder):
    merge(stack((str(folder / "gap"), [2, 4]), (str(folder / "whole"), [0, 2])), folder / "rest")


@pytest.mark.parametrize(
    ("name", "told", "held"), [("short", 4, 3), ("fewer", 3, 4), ("more", 6, 4)]
)
def test_a_mixture_has_the_layers_that_its_config_counts(name, told, held, folder):
    recipe = {"merge_method": "sparse_upcycle", "base_model": str(folder / name)}
    error = refused(recipe, folder)
    assert f"the config counts {told} layers, model.layers holds {held}" in str(error)
    assert "repair the config" in str(error)
