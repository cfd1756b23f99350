"""Which level of a recipe sets a parameter for a tensor, and as what type."""

from __future__ import annotations

import pytest

from merge_kit.errors import RecipeError
from merge_kit.recipe import parse_recipe
from merge_kit.recipe.lookup import coerce, lookup
from merge_kit.recipe.values import Mark, Rule, Setting

HERE = Mark("r.yaml", 3, 4)


def setting(*rules):
    return {"weight": Setting(rules, HERE)}


def value(tensor, t, *levels):
    found = lookup("weight", levels, tensor, t)
    return found and found[0]


def test_the_narrowest_level_that_sets_it_wins():
    narrow, wide = setting(Rule((1.0,))), setting(Rule((2.0,)))
    assert value("x", 0, narrow, wide) == 1
    assert value("x", 0, {}, wide) == 2
    assert value("x", 0, {}, {}) is None


def test_zero_and_false_are_set():
    assert value("x", 0, setting(Rule((0.0,))), setting(Rule((2.0,)))) == 0
    assert value("x", 0, setting(Rule((False,))), setting(Rule((True,)))) is False


def test_filters_that_do_not_match_fall_through_to_the_next_level():
    # a list of filters in the model, a gradient from 10 to 30 in the recipe, five layers
    text = "merge_method: linear\nparameters: {weight: [10, 30]}\nmodels:\n- model: a\n"
    text += "  parameters:\n    weight: [{filter: self_attn, value: [0, 1]}, "
    text += "{filter: embed, value: 5}]\n"
    stage = parse_recipe(text).stages[0]
    levels = (stage.models[0].parameters, stage.parameters)
    assert value("model.layers.1.self_attn.q_proj.weight", 1 / 4, *levels) == 0.25
    assert value("model.layers.1.mlp.up_proj.weight", 1 / 4, *levels) == 15
    assert value("model.embed_tokens.weight", 0, *levels) == 5
    assert value("model.norm.weight", 0, *levels) == 10


def test_the_first_filter_that_is_part_of_the_name_wins():
    rules = setting(Rule((1.0,), "layers.1"), Rule((2.0,), "*"), Rule((3.0,)))
    assert value("layers.12.x", 0, rules) == 1  # plain text: also in layers.12
    assert value("Layers.1.x", 0, rules) == 2


def test_the_place_of_the_value_comes_with_it():
    assert lookup("weight", [setting(Rule((1.0,)))], "x", 0) == (1.0, HERE)


@pytest.mark.parametrize(
    ("written", "kind", "expected"),
    [
        (1, float, 1.0),
        ("1e-3", float, 0.001),
        (" .5 ", float, 0.5),
        (True, float, 1.0),
        ("10000000000000000000000", float, 1e22),
        (10.0, int, 10),
        ("10", int, 10),
        ("1e1", int, 10),
        (0, bool, False),
        (1.0, bool, True),
        ("False", bool, False),
        ("on", bool, True),
        ("paper", str, "paper"),
    ],
)
def test_values_as_types(written, kind, expected):
    found = coerce(written, kind, HERE)
    assert found == expected
    assert type(found) is kind


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        ("x", float),
        ("", float),
        ("nan", float),
        ("1_000", float),
        ("٣", float),
        (float("inf"), float),
        (10**400, float),
        ("1" * 200, float),
        (1.5, int),
        ("1.5", int),
        (True, int),  # `overlap: true` is no number of layers
        (False, int),
        (2, bool),
        (0.5, bool),
        ("maybe", bool),
        (3, str),
        (False, str),
    ],
)
def test_values_of_other_types_are_refused(written, kind):
    with pytest.raises(RecipeError, match="expected") as caught:
        coerce(written, kind, HERE)
    assert caught.value.where == "r.yaml:3:4"
