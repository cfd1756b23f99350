"""`uses:` as it is read, and what is wrong with it at its place."""

from __future__ import annotations

import pytest
from jsonschema import Draft202012Validator

from merge_kit.errors import MergeKitError
from merge_kit.recipe.findings import Findings
from merge_kit.recipe.nodes import plain
from merge_kit.recipe.parse import parse_recipe
from merge_kit.recipe.schema import recipe_schema
from merge_kit.recipe.yaml_text import read_documents

START = "merge_method: lora_concat\nmodels:\n  - {model: a}\n  - {model: b}\n"


def test_weights_stand_in_the_order_of_the_models():
    text = START + "uses:\n  chat: [1, 0.5]\n  code-2: ['-1e-1', 0]\n"
    (stage,) = parse_recipe(text).stages
    assert stage.uses == (("chat", (1.0, 0.5)), ("code-2", (-0.1, 0.0)))
    Draft202012Validator(recipe_schema()).validate(plain(read_documents(text, "r", Findings())[0]))


WRONG = {
    "too few": ("uses: {chat: [1]}", "r.yaml:5:14: chat is a list of 1, expected 2 weights"),
    "no list": ("uses: {chat: 1}", "r.yaml:5:14: chat is 1, expected a list"),
    "no number": ("uses: {chat: [1, much]}", "r.yaml:5:18: chat.1 is 'much', expected a finite"),
    "not finite": ("uses: {chat: [1, .inf]}", "r.yaml:5:18: chat.1 is inf, expected a finite"),
    "outside": ("uses: {../x: [1, 1]}", "r.yaml:5:8: '../x' is no name for a folder"),
    "hidden": ("uses: {.x: [1, 1]}", "r.yaml:5:8: '.x' is no name for a folder"),
    "taken": ("uses: {README.md: [1, 1]}", "r.yaml:5:8: 'README.md' is no name for a folder"),
    "twice": ("uses: {a: [1, 1], A: [1, 1]}", "r.yaml:5:19: 'a' and 'A' are one folder"),
    "empty": ("uses: {}", "r.yaml:5:7: uses is a mapping, expected 1 to 1000 adapters"),
    "a list": ("uses: [1, 1]", "r.yaml:5:7: uses is a list of 2, expected a mapping"),
    "weights": (
        "uses: {a: [1, 1]}\nparameters: {weight: 1}",
        "r.yaml:6:14: found weight beside uses",
    ),
}


@pytest.mark.parametrize("row", WRONG)
def test_what_is_wrong_is_said_at_its_place(row):
    more, message = WRONG[row]
    with pytest.raises(MergeKitError) as caught:
        parse_recipe(START + more + "\n", source="r.yaml")
    assert str(caught.value).startswith(message), caught.value


def test_a_weight_of_a_model_beside_uses_is_refused_at_its_place():
    text = START.replace("{model: b}", "{model: b, parameters: {weight: 2}}") + "uses: {a: [1, 1]}"
    with pytest.raises(MergeKitError, match=r"r.yaml:4:29: found weight beside uses"):
        parse_recipe(text, source="r.yaml")


@pytest.mark.parametrize("method", ["linear", "lora_extract"])
def test_methods_that_combine_no_adapters_have_no_uses(method):
    text = START.replace("lora_concat", method) + "base_model: c\nuses: {a: [1, 1]}"
    with pytest.raises(MergeKitError, match=f"r.yaml:6:1: uses has no meaning with {method}"):
        parse_recipe(text, source="r.yaml")


def test_an_adapter_may_be_named_twice_and_a_model_may_not():
    twice = "merge_method: {}\nmodels: [{{model: a}}, {{model: a}}]\n"
    assert len(parse_recipe(twice.format("lora_ties")).stages[0].models) == 2
    with pytest.raises(MergeKitError, match="twice"):
        parse_recipe(twice.format("linear"))
