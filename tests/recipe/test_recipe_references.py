"""References to models, with and without files of that name."""

from __future__ import annotations

import jsonschema
import pytest

from merge_kit.errors import RecipeError
from merge_kit.recipe import parse_recipe, recipe_schema
from merge_kit.recipe.references import split_reference
from merge_kit.recipe.values import Mark, ModelRef

HERE = Mark("r.yaml", 1, 1)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("org/name", ("org/name", None, ())),
        ("org/name@main", ("org/name", "main", ())),
        ("org/name+lora", ("org/name", None, ("lora",))),
        ("org/name@v1+lora@v2", ("org/name", "v1", ("lora@v2",))),
        ("base+a+b@x", ("base", None, ("a", "b@x"))),
    ],
)
def test_text_references(text, parts):
    found = split_reference(text, None, HERE)
    assert found == ModelRef(*parts)
    assert found.text == text


@pytest.mark.parametrize(
    ("names", "text", "parts"),
    [
        (["a+b"], "a+b", ("a+b", None, ())),
        (["a@b"], "a@b", ("a@b", None, ())),
        (["c++"], "c+++lora", ("c++", None, ("lora",))),
        (["c++"], "c++@v1+lora", ("c++", "v1", ("lora",))),
        (["a@b"], "a@b@v1", ("a@b", "v1", ())),
        (["x+y"], "a+x+y", ("a", None, ("x+y",))),
        (["a"], "a+b", ("a", None, ("b",))),
    ],
)
def test_existing_paths_beside_the_recipe_win(tmp_path, names, text, parts):
    for name in names:
        (tmp_path / name).mkdir()
    assert split_reference(text, tmp_path, HERE) == ModelRef(*parts)


def test_existing_paths_in_the_working_directory_win(tmp_path, monkeypatch):
    (tmp_path / "a+b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert split_reference("a+b", None, HERE) == ModelRef("a+b")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_names_that_no_file_can_have_are_names(name):
    assert split_reference(name, None, HERE).path == name


@pytest.mark.parametrize(
    ("written", "reference"),
    [
        ("{model: a}", ModelRef("a")),
        ("{model: a@v1}", ModelRef("a", "v1")),
        ("{model: a+b}", ModelRef("a+b")),
        ("{model: {path: a+b@c}}", ModelRef("a+b@c")),
        ("{model: {path: a, revision: v1}, lora: l@v2}", ModelRef("a", "v1", ("l@v2",))),
        ("{model: a, lora: {path: l, revision: v2}}", ModelRef("a", None, ("l@v2",))),
        ("{model: a, lora: [l, m]}", ModelRef("a", None, ("l", "m"))),
        ("{model: a, lora: {path: l, weight: -0.5}}", ModelRef("a", None, ("l",), weights=(-0.5,))),
        (
            "{model: a, lora: [l, {path: m, revision: v, weight: 1e-3}]}",
            ModelRef("a", None, ("l", "m@v"), weights=(1.0, 0.001)),
        ),
        ("{model: a, lora: [{path: l, weight: 1.0}, m]}", ModelRef("a", None, ("l", "m"))),
    ],
)
def test_mapping_references(written, reference):
    recipe = parse_recipe(f"merge_method: passthrough\nmodels: [{{model: {written}}}]\n")
    assert recipe.stages[0].models[0].model == reference


def test_override_architecture_is_noted():
    text = "merge_method: passthrough\nmodels: [{model: {model: a, override_architecture: L}}]\n"
    assert "override_architecture has no effect" in parse_recipe(text).notes[0]


def test_revisions_and_adapters_make_models_differ():
    text = "merge_method: linear\nparameters: {weight: 1}\n"
    text += "models: [{model: a}, {model: a@main}, {model: a+l}]\n"
    assert len(parse_recipe(text).stages[0].models) == 3


def test_weights_of_adapters_make_models_differ():
    text = "merge_method: linear\nparameters: {weight: 1}\nmodels:\n"
    text += "- model: {model: a, lora: {path: l, weight: 2}}\n- model: a+l\n"
    one, other = (entry.model for entry in parse_recipe(text).stages[0].models)
    assert one != other
    assert one.applied() == (("l", 2.0),)
    assert other.applied() == (("l", 1.0),)


@pytest.mark.parametrize("weight", ["x", ".nan", ".inf", "[1]", "true", "{a: 1}"])
def test_weights_of_adapters_are_finite_numbers(weight):
    given = f"{{path: l, weight: {weight}}}"
    text = f"merge_method: passthrough\nmodels:\n- model: {{model: a, lora: {given}}}\n"
    with pytest.raises(RecipeError, match=r"recipe>:3:\d+: weight is .*, expected a finite number"):
        parse_recipe(text)


def test_unknown_keys_of_adapters_are_refused():
    text = "merge_method: passthrough\nmodels: [{model: {model: a, lora: {path: l, wieght: 1}}}]\n"
    with pytest.raises(RecipeError, match=r"unknown key 'wieght'.*\n.*'weight'"):
        parse_recipe(text)


def test_weights_of_adapters_fit_the_schema():
    check = jsonschema.Draft202012Validator(recipe_schema())

    def document(adapter):
        entry = {"model": {"model": "a", "lora": adapter}}
        return {"merge_method": "passthrough", "models": [entry]}

    for fine in ("l", {"path": "l", "weight": -0.5}, ["l", {"path": "m", "weight": "1e-3"}]):
        check.validate(document(fine))
    for wrong in ({"weight": 1}, {"path": "l", "weight": [1]}, {"path": "l", "wieght": 1}):
        assert not check.is_valid(document(wrong))
