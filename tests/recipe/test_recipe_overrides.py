"""`--set key=value`."""

from __future__ import annotations

import pytest
import yaml

from merge_kit.errors import MergeKitError, Problems, UsageError
from merge_kit.recipe import parse_recipe, recipe_from_mapping
from merge_kit.recipe.values import Rule

TEXT = """# a comment
merge_method: linear
models:
- model: a
  parameters: {weight: 1}
"""


def changed(*overrides, text=TEXT):
    return parse_recipe(text, source="r.yaml", overrides=overrides)


def test_a_value_in_a_list_is_replaced():
    recipe = changed("models.0.parameters.weight=[0, 1e-1]")
    assert recipe.stages[0].models[0].parameters["weight"].rules == (Rule((0.0, 0.1)),)


def test_the_text_says_what_was_run():
    recipe = changed("seed=3", "dtype=bfloat16")
    assert yaml.safe_load(recipe.text)["seed"] == 3
    assert parse_recipe(recipe.text).stages[0].dtype == "BF16"
    assert parse_recipe(recipe.text).text == recipe.text


def test_missing_mappings_are_made():
    assert changed("parameters.normalize=no").stages[0].parameters["normalize"].rules == (
        Rule((False,)),
    )


def test_later_overrides_see_earlier_ones():
    recipe = changed("models=[{model: x}, {model: y}]", "models.1.model=z", "parameters.weight=1")
    assert [entry.model.path for entry in recipe.stages[0].models] == ["x", "z"]


def test_an_empty_value_takes_a_key_away():
    recipe = changed("models.0.parameters=", "parameters.weight=2")
    assert recipe.stages[0].models[0].parameters == {}


def test_a_value_may_hold_equals_signs():
    assert changed("output=a=b").output == "a=b"


def test_keys_with_dots_are_found():
    text = "merge_method: passthrough\nmodules: {model.layers: {models: [{model: a}]}}\n"
    recipe = changed("modules.model.layers.models.0.model=b", text=text)
    assert recipe.stages[0].modules[0].models[0].model.path == "b"


def test_only_the_last_document_is_addressed():
    text = f"name: s\n{TEXT}---\nmerge_method: linear\nmodels: [{{model: s}}]\n---\n"
    recipe = changed("parameters.weight=3", text=text)
    assert [bool(stage.parameters) for stage in recipe.stages] == [False, True]
    assert len(list(yaml.safe_load_all(recipe.text))) == 2


def test_mappings_are_overridden_too():
    mapping = {"merge_method": "linear", "models": [{"model": "a"}]}
    recipe = recipe_from_mapping(mapping, overrides=["models.0.model=b"])
    assert yaml.safe_load(recipe.text)["models"] == [{"model": "b"}]


@pytest.mark.parametrize(
    ("override", "problem", "hint"),
    [
        ("seed", "expected key=value", "for example"),
        ("=3", "expected key=value", ""),
        ("models..model=3", "expected key=value", ""),
        ("modls.0.model=a", "a recipe has no key 'modls'", "did you mean 'models'?"),
        ("models.1.model=a", "models is a list with indices 0 to 0, found '1'", ""),
        ("models.-1.model=a", "models is a list with indices 0 to 0, found '-1'", ""),
        ("models.first.model=a", "models is a list with indices 0 to 0, found 'first'", ""),
        ("models.0.model.path=a", "model is a single value and has no 'path' in it", ""),
        ("models.0.modle=a", "unknown key 'modle' in models.0", "did you mean 'model'?"),
        ("models.0.parameters.wieght=1", "no parameter 'wieght'", "did you mean 'weight'?"),
        ("models.0.parameters.weight=x", "weight is 'x', expected a finite number", ""),
        ("seed=[1", "not valid YAML", ""),
        ("seed=!!python/none x", "the tag !!python/none is not allowed", ""),
        ("seed={a: 1, a: 2}", "the key 'a' stands twice", ""),
        ("seed=1\n---\n2", "found several documents, expected one value", ""),
        ("dtype=bf16", "dtype is 'bf16'", "did you mean 'bfloat16'?"),
    ],
)
def test_wrong_overrides_are_usage_errors_that_name_them(override, problem, hint):
    with pytest.raises(MergeKitError) as caught:
        changed(override)
    error = caught.value
    assert isinstance(error, UsageError)
    assert problem in error.problem
    assert hint in error.hint
    assert error.where == f"--set {override}"


def test_all_wrong_overrides_come_in_one_list():
    with pytest.raises(Problems) as caught:
        changed("sed=1", "models.7=1")
    assert len(caught.value.errors) == 2
