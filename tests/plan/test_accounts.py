"""Each tensor of each input has one fate, and it is what the steps do."""

from __future__ import annotations

import pytest
import torch

from merge_kit.plan.walk import operands, stored
from tests.toys import family, layers, merge, plan, write

STAGE = """
name: {}
merge_method: linear
parameters: {{weight: 1}}
models: [{{model: ONE}}, {{model: K}}]
---
"""
RECIPES = {
    "models": "{merge_method: slerp, base_model: ONE, models: [{model: K}], parameters: {t: 0.5}}",
    "slices": """
merge_method: linear
parameters: {weight: 1}
slices:
  - sources: [{model: ONE, layer_range: [0, 2]}, {model: K, layer_range: [1, 3]}]
  - sources: [{model: IDX, layer_range: [4, 5]}]
""",
    "rules": """
base_model: ONE
tensors: [{match: "*mlp*", copy: K}, {match: "*norm*", drop: true}]
""",
    "modules": """
merge_method: linear
parameters: {weight: 1}
modules: {default: {slices: [{sources: [{model: ONE, layer_range: [1, 3]}]}]}}
""",
    "slices of a stage": STAGE.format("s")
    + "merge_method: passthrough\nslices: [{sources: [{model: s, layer_range: [1, 2]}]}]\n",
    "rules over a stage": STAGE.format("s")
    + 'base_model: s\ntensors: [{match: "*mlp*", copy: IDX}, {match: "lm_head*", drop: true}]\n',
    "a stage of a stage": STAGE.format("s")
    + "name: t\nmerge_method: passthrough\nmodels: [{model: s}]\n---\n"
    + "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: t}, {model: ZERO}]\n",
}


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    return family(tmp_path_factory.mktemp("toys"))


def read_by_steps(made) -> set[tuple[str, int]]:
    """Return file and first byte of every tensor that the steps read."""
    sources = (operand for step in made.steps for operand in (*operands(step), *step.agree))
    return {(s.span.path.parent.name, s.span.start) for one in sources for s in stored(one)}


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_not_dropped_is_what_the_steps_read(toys, name):
    made = plan(RECIPES[name], toys)
    names = {model.key: model.name for model in made.inputs}
    assert len({(f.model, f.tensor) for f in made.fates}) == len(made.fates) == 18 * len(names)
    assert all(fate.why for fate in made.fates if fate.what == "dropped")
    kept = [names[fate.model] for fate in made.fates if fate.what != "dropped"]
    read = [folder for folder, _ in read_by_steps(made)]
    assert sorted(kept) == sorted(read)


def test_what_a_stage_makes_in_vain_is_dropped(toys):
    made = plan(RECIPES["slices of a stage"], toys)
    merged = {fate.tensor for fate in made.fates if fate.what == "merged"}
    assert {name for name in merged if ".layers." in name} == {
        f"model.layers.1.{suffix}.weight"
        for suffix in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
    }
    why = {fate.why for fate in made.fates if fate.what == "dropped"}
    assert why == {"in no slice"}


def test_what_a_stage_passes_on_to_a_merge_is_merged(toys):
    fates = plan(RECIPES["a stage of a stage"], toys).fates
    assert {fate.what for fate in fates} == {"merged"}


def test_integers_that_lose_a_conflict_are_dropped(tmp_path):
    for name, last in (("a", 1), ("b", 2)):
        write(tmp_path / name, {"ids": torch.tensor([0, last]), "w": torch.ones(2)}, None)
    text = """
merge_method: linear
parameters: {weight: 1}
on_conflict: first
models: [{model: a}, {model: b}]
"""
    fates = {(f.model, f.tensor): (f.what, f.why) for f in plan(text, tmp_path).fates}
    assert fates["input-1", "ids"] == ("copied", "")
    assert fates["input-2", "ids"] == ("dropped", "on_conflict: first")
    equal = {f.what for f in plan(text.replace("first", "error"), tmp_path).fates}
    assert equal == {"copied", "merged"}


@pytest.mark.parametrize("name", ["output", "input-1", "input-2"])
def test_a_stage_may_have_any_name(toys, name):
    text = (
        STAGE.format(name)
        + f"""
merge_method: task_arithmetic
base_model: {name}
parameters: {{weight: 0.5}}
models: [{{model: ZERO}}]
"""
    )
    assert set(layers(merge(text, toys))) == {500.5 / 2}
    assert {fate.what for fate in plan(text, toys).fates} == {"merged"}
