"""More of the dialect: models by their references, heads of tied models, rules beside slices."""

from __future__ import annotations

import json

import pytest
import torch

from merge_kit.errors import MismatchError, PlanError
from tests.toys import OUTSIDE, config, family, layers, merge, outside, plan, value, write


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    return family(tmp_path_factory.mktemp("toys"))


def config_of(made) -> dict:
    return json.loads(next(f.text for f in made.side_files if f.name == "config.json"))


# One folder under two references is two models.


def test_two_references_to_one_folder_take_their_own_layers(toys):
    result = merge(
        """
        merge_method: linear
        parameters: {normalize: false}
        slices:
          - sources:
              - {model: IDX, layer_range: [0, 2], parameters: {weight: 1}}
              - {model: IDX@again, layer_range: [2, 4], parameters: {weight: 10}}
        """,
        toys,
    )
    assert layers(result) == [1 + 30, 2 + 40]
    assert outside(result) == [1100, 2200, 3300]


def test_an_arc_between_two_depths_of_one_model(toys):
    result = merge(
        """
        merge_method: slerp
        base_model: IDX
        parameters: {t: 0.25}
        slices:
          - sources: [{model: IDX@x, layer_range: [3, 5]}, {model: IDX, layer_range: [0, 2]}]
        """,
        toys,
    )
    assert layers(result) == [0.75 * 1 + 0.25 * 4, 0.75 * 2 + 0.25 * 5]


@pytest.mark.parametrize(
    ("listed", "wanted"),
    [
        ("{model: IDX@main}, {model: K}", 1000 + 2 * 1),  # the base is a third model
        ("{model: IDX}, {model: K}", 1000 + 1),
        ("{model: {model: {path: IDX}}}, {model: K}", 1000 + 1),
    ],
)
def test_a_base_is_listed_if_its_whole_reference_is(toys, listed, wanted):
    text = "{{merge_method: linear, base_model: IDX, models: [{}], parameters: {}}}"
    recipe = text.format(listed, "{weight: 1, normalize: false}")
    assert layers(merge(recipe, toys))[0] == wanted
    added = any("is not listed" in note for note in plan(recipe, toys).notes)
    assert added == ("@main" in listed)


def test_another_reference_to_the_base_is_a_task_of_its_own(toys):
    result = merge(
        """
        merge_method: task_arithmetic
        base_model: ONE
        parameters: {weight: 1, normalize: true}
        models: [{model: ONE@main}, {model: K}]
        """,
        toys,
    )
    assert set(layers(result)) == {1 + (0 + 999) / 2}


def test_a_base_that_modules_add_is_said_with_its_weight(toys):
    recipe = """
merge_method: linear
base_model: IDX
parameters: {weight: 3, normalize: false}
modules: {default: {models: [{model: K}]}}
"""
    assert layers(merge(recipe, toys))[1] == 3 * 1002
    notes = plan(recipe, toys).notes
    assert any("IDX is not listed and is added" in n and "weight 3" in n for n in notes)


def test_a_layer_without_a_tensor_is_not_given_another_layers(tmp_path):
    for name in "ab":
        tensors = {f"model.layers.{i}.w": torch.full((2,), i + 1.0) for i in range(4)}
        present = (1, 2) if name == "a" else (2,)
        tensors |= {f"model.layers.{i}.sink": torch.full((2,), 10.0 * i) for i in present}
        write(tmp_path / name, tensors, config(4))
    text = "{{merge_method: linear, parameters: {{weight: 1}}, slices: [{}, {}, {}]}}"
    pair = "{{sources: [{{model: a, layer_range: {}}}, {{model: b, layer_range: {}}}]}}".format
    recipe = text.format(pair([0, 1], [0, 1]), pair([3, 4], [3, 4]), pair([2, 3], [1, 2]))
    with pytest.raises(MismatchError, match=r"input-2:b: lacks 1 tensors .*model\.layers\.1\.sink"):
        plan(recipe, tmp_path)


# Heads of tied models at the ends of a stack.


def head_model(folder, number: float, *, tied: bool):
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    tensors = {n: torch.full((4, 4), number) for n in [*names, "model.embed_tokens.weight"]}
    if not tied:
        tensors["lm_head.weight"] = torch.full((4, 4), number + 0.5)
    return write(folder, tensors, config(2, tie_word_embeddings=tied))


STACK = """
merge_method: passthrough
slices:
  - sources: [{{model: {}, layer_range: [0, 1]}}]
  - sources: [{{model: {}, layer_range: [1, 2]}}]
"""


@pytest.mark.parametrize(
    ("first", "last", "base", "head", "tied"),
    [
        ("untied", "tied", None, 3.0, False),  # the donor is the first: untied
        ("tied", "untied", None, 1.5, False),
        ("tied", "untied", "tied", 1.5, False),
        ("tied", "tied", None, None, True),
        ("tied", "tied", "untied", 3.0, False),
    ],
)
def test_a_stack_ends_with_the_head_of_its_last_model(tmp_path, first, last, base, head, tied):
    head_model(tmp_path / "tied", 3.0, tied=True)
    head_model(tmp_path / "untied", 1.0, tied=False)
    recipe = STACK.format(first, last) + (f"base_model: {base}\n" if base else "")
    result, made = merge(recipe, tmp_path), plan(recipe, tmp_path)
    found = value(result["lm_head.weight"]) if "lm_head.weight" in result else None
    assert found == head
    assert config_of(made)["tie_word_embeddings"] is tied
    is_noted = any("lm_head.weight: the tied head of" in note for note in made.notes)
    assert is_noted == (head == 3.0)


def test_filters_see_the_head_that_an_embedding_stands_for(tmp_path):
    head_model(tmp_path / "tied", 3.0, tied=True)
    head_model(tmp_path / "untied", 1.0, tied=False)
    recipe = """
merge_method: linear
parameters: {normalize: false}
models:
  - model: tied
    parameters:
      weight: [{filter: lm_head, value: 5}, {filter: embed, value: 7}, {value: 1}]
  - {model: untied, parameters: {weight: 1}}
"""
    result = merge(recipe, tmp_path)
    assert value(result["lm_head.weight"]) == 5 * 3 + 1.5
    assert value(result["model.embed_tokens.weight"]) == 7 * 3 + 1


# Rules are exceptions from whatever else the recipe says.


@pytest.mark.parametrize(
    "form",
    [
        "slices: [{sources: [{model: IDX, layer_range: [0, 2]}]}]",
        "modules: {default: {models: [{model: IDX}]}}",
    ],
)
def test_rules_beside_slices_or_modules_are_refused(toys, form):
    text = f"""
merge_method: passthrough
base_model: IDX
{form}
tensors: [{{match: "model.layers.1.*", copy: K}}]
"""
    with pytest.raises(PlanError, match="beside slices or modules"):
        plan(text, toys)


def test_rules_over_a_stack_go_through_a_stage(toys):
    result = merge(
        """
        name: stack
        merge_method: passthrough
        slices: [{sources: [{model: IDX, layer_range: [3, 5]}]}]
        ---
        base_model: stack
        tensors: [{match: "model.layers.1.*", copy: K}]
        """.replace("\n        ", "\n"),
        toys,
    )
    assert layers(result) == [4, 1000]


def test_rules_bring_in_what_only_another_model_has(tmp_path):
    write(tmp_path / "a", {"x": torch.ones(2)}, None)
    write(tmp_path / "b", {"x": torch.ones(2) * 3, "y": torch.ones(2) * 5}, None)
    text = """
merge_method: linear
base_model: a
models: [{model: a, parameters: {weight: 1}}]
tensors: [{match: y, copy: b}]
"""
    result = merge(text, tmp_path)
    assert {name: value(tensor) for name, tensor in result.items()} == {"x": 1, "y": 5}


def test_without_another_form_the_rest_is_the_bases(toys):
    result = merge('{base_model: IDX, tensors: [{match: "*norm*", copy: K}]}', toys)
    assert layers(result) == [1, 2, 3, 4, 5]
    assert [value(result[name]) for name in OUTSIDE] == [100, 1000, 300]
