"""The map of layers leads to the checkpoints, through every stage between them and the output."""

from __future__ import annotations

import json

import plain_models
import pytest
import torch

from merge_kit.api import merge
from merge_kit.plan.describe_json import plan_json
from merge_kit.plan.describe_steps import layer_lines, rule_lines
from tests.toys import plan

DEEP = """\
name: deep
merge_method: depth_upscale
models: [{model: a}]
parameters: {overlap: 1}
---
"""
MIXTURE = "merge_method: sparse_upcycle\nbase_model: deep\nparameters: {num_experts: 2}\n"
PLACE = "each layer from the layers of the same number"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("stages")
    for seed, name in enumerate("ab"):
        plain_models.write(root / name, "llama", 3, seed, torch.float32)
    return root


def lines(text, folder):
    return layer_lines(plan(text, folder))


def test_a_mixture_of_a_deeper_model_leads_to_its_layers(folder):
    assert lines(DEEP + MIXTURE, folder) == [
        "deep: model.layers 0-1 from input-1:a 0-1",
        "deep: model.layers 2-3 from input-1:a 1-2",
        "model.layers 0-3 from deep 0-3",
    ]


def test_a_stack_of_a_stack_leads_to_both(folder):
    text = """\
name: low
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2], parameters: {scale: {filter: o_proj, value: 0.5}}}]
  - sources: [{model: b, layers: [2]}]
---
merge_method: passthrough
slices:
  - sources: [{model: low, layer_range: [1, 3]}]
  - sources: [{model: b, layers: [0]}]
"""
    assert lines(text, folder) == [
        "low: model.layers 0-1 from input-1:a 0-1, o_proj x 0.5",
        "low: model.layers 2 from input-2:b 2",
        "model.layers 0-1 from low 1-2",
        "model.layers 2 from input-2:b 0",
    ]


def test_a_merge_in_the_middle_or_at_the_end_names_its_models(folder):
    mean = "name: mean\nmerge_method: linear\nparameters: {weight: 1}\n"
    mean += "models: [{model: a}, {model: b}]\n---\n"
    stack = "merge_method: passthrough\nslices:\n  - sources: [{model: mean, layers: [0, 2]}]\n"
    assert lines(mean + stack, folder) == [
        f"mean: linear of input-1:a, input-2:b, {PLACE}",
        "model.layers 0 from mean 0",
        "model.layers 1 from mean 2",
    ]
    both = (
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: deep}, {model: deep2}]\n"
    )
    two = DEEP + DEEP.replace("name: deep", "name: deep2").replace("model: a", "model: b")
    found = lines(two + both, folder)
    assert found[-1] == f"output: linear, {PLACE}"
    assert [line.split(":")[0] for line in found] == ["deep", "deep", "deep2", "deep2", "output"]


def test_stages_that_move_nothing_have_no_map(folder):
    mean = "name: mean\nmerge_method: linear\nparameters: {weight: 1}\n"
    mean += "models: [{model: a}, {model: b}]\n---\nmerge_method: linear\n"
    text = mean + "parameters: {weight: 1}\nmodels: [{model: mean}, {model: a}]\n"
    assert lines(text, folder) == [
        f"no layer is moved: {PLACE.replace('each layer', 'each comes')}"
    ]


def test_json_keeps_the_output_apart_from_the_stages(folder):
    told = plan_json(plan(DEEP + MIXTURE, folder))
    assert [one["sources"] for one in told["layer_map"]] == [[["deep", i]] for i in range(4)]
    (stage,) = told["stage_layers"]
    assert (stage["stage"], stage["method"], stage["models"]) == (
        "deep",
        "depth_upscale",
        ["input-1"],
    )
    assert [one["sources"] for one in stage["origins"]] == [[["input-1", i]] for i in (0, 1, 1, 2)]
    json.dumps(told)


@pytest.mark.parametrize(
    "last",
    [MIXTURE, "merge_method: passthrough\nmodels: [{model: deep}]\n"],
)
def test_the_card_has_the_map_of_every_stage(last, folder, tmp_path):
    (folder / "r.yaml").write_text(DEEP + last, encoding="utf-8")
    card = (merge(folder / "r.yaml", tmp_path / "out").output / "README.md").read_text()
    assert "`deep: model.layers 2-3 from input-1:a 1-2`" in card


@pytest.mark.parametrize(
    ("gradient", "shown"),
    [("[1, 0.5]", "1 to 0.5"), ("[0.5, 1]", "0.5 to 1"), ("[1, 0.5, 1]", "0.5 to 1")],
)
def test_a_gradient_is_shown_from_the_first_layer_to_the_last(gradient, shown, folder):
    scale = f"parameters: {{scale: {{filter: o_proj, value: {gradient}}}}}"
    sources = f"  - sources: [{{model: a, layer_range: [0, 3], {scale}}}]\n"
    text = f"merge_method: passthrough\nslices:\n{sources}"
    assert lines(text, folder) == [f"model.layers 0-2 from input-1:a 0-2, o_proj x {shown}"]


def test_rules_tell_the_noise_and_the_factor_of_an_expert(folder):
    text = "merge_method: sparse_upcycle\nbase_model: a\n"
    text += "parameters: {num_experts: 2, noise_scale: 0.25, residual_scale: 0.5}\n"
    found = dict(line.split(": ", 1) for line in rule_lines(plan(text, folder)))
    experts = {key: said for key, said in found.items() if ".experts." in key}
    noise = "sparse_upcycle of input-1:a plus normal numbers times 0.25"
    assert set(experts.values()) == {noise, f"{noise}, times 0.5"}
    halved = [key for key, said in experts.items() if said.endswith(", times 0.5")]
    assert len(halved) == 6
    assert all("w2" in key or "down_proj" in key for key in halved)
    assert not any("scale=)" in said for said in found.values())
