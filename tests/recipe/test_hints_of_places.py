"""What stands at the wrong place is told its place."""

from __future__ import annotations

import pytest

from merge_kit.errors import MergeKitError
from merge_kit.recipe.parse import parse_recipe


def refused(text):
    with pytest.raises(MergeKitError) as caught:
        parse_recipe(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ("sparse_upcycle", "architecture: mixtral"),
        ("sparse_upcycle", "experts_per_token: 1"),
        ("moe_to_dense", "experts: [0]"),
        ("depth_upscale", "overlap: 2"),
        ("ties", "density: 0.5"),
    ],
)
def test_a_parameter_at_the_top_is_sent_under_parameters(method, line):
    said = refused(f"merge_method: {method}\nbase_model: a\nmodels: [{{model: b}}]\n{line}\n")
    key = line.partition(":")[0]
    assert f"<recipe>:4:1: unknown key {key!r}" in said
    assert f"hint: write it under parameters: {{{key}: ...}}" in said


def test_other_unknown_keys_get_the_nearest():
    said = refused("merge_method: ties\nbase_modell: a\nmodels: [{model: b}]\n")
    assert "did you mean 'base_model'?" in said


def test_prompts_stand_beside_the_model():
    said = refused(
        "merge_method: sparse_upcycle\nbase_model: a\nmodels:\n"
        "  - {model: a, parameters: {positive_prompts: [add]}}\n"
    )
    assert "hint: write positive_prompts beside model, not under parameters" in said


def stacked(first, second):
    return (
        "merge_method: linear\nparameters: {weight: 1}\nslices:\n  - sources:\n"
        f"    - {{model: {first[0]}, layer_range: {first[1]}}}\n"
        f"    - {{model: {second[0]}, layer_range: {second[1]}}}\n"
    )


@pytest.mark.parametrize(
    ("model", "written"),
    [("demo/add", "demo/add@again"), ("demo/base+demo/add", "demo/base@again+demo/add")],
)
def test_other_layers_of_one_model_are_another_source(model, written):
    said = refused(stacked((model, [0, 2]), (model, [2, 4])))
    assert f"hint: for other layers of it write {written}: of a local path" in said
    assert "sum of the weights" not in said
    second = parse_recipe(stacked((model, [0, 2]), (written, [2, 4]))).stages[0].slices[0]
    assert len(second.sources) == 2


def test_the_same_layers_twice_are_one_weight():
    said = refused(stacked(("a", [0, 2]), ("a", [0, 2])))
    assert "hint: list it once, with the sum of the weights" in said


def test_other_layers_of_a_revision_want_a_document():
    said = refused(stacked(("a@main", [0, 2]), ("a@main", [2, 4])))
    assert "hint: give the layers to a document with a name" in said
