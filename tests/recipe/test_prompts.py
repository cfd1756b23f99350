"""Prompts and shared experts of a sparse upcycling, and what is wrong with them at its place."""

from __future__ import annotations

import pytest
import yaml
from jsonschema import Draft202012Validator

from merge_kit.errors import MergeKitError
from merge_kit.recipe import parse_recipe, recipe_from_mapping, recipe_schema
from merge_kit.recipe.prompts import MAX_BYTES, MAX_PROMPTS
from merge_kit.recipe.stages import entries, references
from merge_kit.recipe.values import Prompts

START = "merge_method: sparse_upcycle\nbase_model: base\nparameters: {router: hidden}\nmodels:\n"
TWO = START + "  - {model: a, positive_prompts: [x]}\n  - {model: b, positive_prompts: [y]}\n"


def stage(text):
    return parse_recipe(text).stages[-1]


def fits(text):
    return Draft202012Validator(recipe_schema()).is_valid(yaml.safe_load(text))


def test_prompts_are_those_of_their_model():
    text = START + (
        "  - {model: a, positive_prompts: [one, two]}\n"
        "  - {model: b, positive_prompts: ['3'], negative_prompts: [four], parameters: "
        "{noise_scale: 0.5}}\n"
    )
    assert [entry.prompts for entry in stage(text).models] == [
        Prompts(("one", "two")),
        Prompts(("3",), ("four",)),
    ]
    assert fits(text)


@pytest.mark.parametrize("key", ["model", "source_model"])
def test_a_shared_expert_is_among_what_a_stage_refers_to(key):
    text = TWO + (
        f"shared_experts:\n  - {key}: org/c@v1+org/lora\n    positive_prompts: [z]\n"
        "    parameters: {residual_scale: 0.5}\n"
    )
    (shared,) = stage(text).shared_experts
    assert (shared.model.path, shared.model.revision) == ("org/c", "v1")
    assert shared.prompts == Prompts(("z",))
    assert shared.parameters["residual_scale"].at("", 0.0) == 0.5
    assert [entry.model.path for entry in entries(stage(text))] == ["a", "b", "org/c"]
    assert shared.model in list(references(stage(text)))
    assert fits(text)


def test_a_stage_may_be_a_shared_expert_and_comes_first():
    text = TWO + "shared_experts: [{model: mean, positive_prompts: [z]}]\n---\nname: mean\n"
    text += "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n"
    assert [one.name for one in parse_recipe(text).stages] == ["mean", None]


def test_no_shared_experts_is_the_same_as_an_empty_list():
    assert stage(TWO + "shared_experts: []\n").shared_experts == ()


def test_a_model_may_be_several_experts_and_nothing_else_twice():
    text = TWO + "  - {model: a, positive_prompts: [z]}\n"
    assert [entry.model.path for entry in stage(text).models] == ["a", "b", "a"]
    with pytest.raises(MergeKitError, match="'a' stands twice"):
        parse_recipe("merge_method: linear\nmodels: [{model: a}, {model: a}]\n")


def test_a_base_alone_is_enough_for_what_builds_of_it():
    text = "merge_method: sparse_upcycle\nbase_model: a\nparameters: {num_experts: 4}\n"
    assert stage(text).models == ()
    assert fits(text)
    with pytest.raises(MergeKitError, match="found no models, slices or modules"):
        parse_recipe("merge_method: linear\nbase_model: a\n")


WRONG = {
    "text": ("  - {model: a, positive_prompts: x}", "5:34: positive_prompts is 'x', expected a l"),
    "number": (
        "  - {model: a, positive_prompts: [1]}",
        "5:35: positive_prompts.0 is 1, expected t",
    ),
    "null": (
        "  - {model: a, positive_prompts: [~]}",
        "5:35: positive_prompts.0 is empty, expected",
    ),
    "blank": ("  - {model: a, positive_prompts: [' ']}", "5:35: positive_prompts.0 is ' ', expect"),
    "nested": ("  - {model: a, positive_prompts: [[x]]}", "5:35: positive_prompts.0 is a list of"),
    "mapping": ("  - {model: a, negative_prompts: {x: y}}", "5:34: negative_prompts is a mapping"),
    "missing": ("  - {model: a}", "5:5: 'a' has no positive_prompts, which router: hidden needs"),
    "none": ("  - {model: a, positive_prompts: []}", "5:5: 'a' has no positive_prompts"),
    "only negative": ("  - {model: a, negative_prompts: [x]}", "5:5: 'a' has no positive_prompts"),
    "misspelled": ("  - {model: a, positive_prompt: [x]}", "5:16: unknown key 'positive_prompt'"),
    "source_model": ("  - {source_model: a}", "5:5: model is missing"),
    "equal": (
        "  - {model: a, positive_prompts: [x]}\n  - {model: b, positive_prompts: [x]}",
        "6:5: all experts have the same prompts",
    ),
    "two shared": (
        "  - {model: a, positive_prompts: [x]}\nshared_experts: [{model: b}, {model: c}]",
        "6:17: shared_experts is a list of 2, expected one model",
    ),
    "shared with negative prompts": (
        (
            "  - {model: a, positive_prompts: [x]}\n"
            "shared_experts: [{model: b, negative_prompts: [y]}]"
        ),
        "6:18: 'b' has no positive_prompts, which router: hidden needs",
    ),
    "shared twice named": (
        "  - {model: a, positive_prompts: [x]}\nshared_experts: [{model: b, source_model: c}]",
        "6:29: unknown key 'source_model' in shared_experts.0",
    ),
    "shared text": (
        "  - {model: a, positive_prompts: [x]}\nshared_experts: b",
        "6:17: shared_experts is 'b', expected a list",
    ),
}


@pytest.mark.parametrize("row", WRONG)
def test_what_is_wrong_is_said_at_its_place(row):
    more, message = WRONG[row]
    with pytest.raises(MergeKitError) as caught:
        parse_recipe(START + more + "\n", source="r.yaml")
    assert f"r.yaml:{message}" in str(caught.value)


@pytest.mark.parametrize("router", ["random", "uniform_random", "zero"])
def test_routers_of_no_prompts_need_none(router):
    text = START.replace("hidden", router) + "  - {model: a}\n  - {model: b}\n"
    assert [entry.prompts for entry in stage(text).models] == [None, None]


def test_the_default_router_needs_no_prompts():
    text = START.replace("parameters: {router: hidden}\n", "") + "  - {model: a}\n"
    assert stage(text).models[0].prompts is None


@pytest.mark.parametrize("router", ["hidden", "hidden_avg", "cheap_embed"])
def test_routers_of_prompts_need_them_of_every_model(router):
    text = TWO.replace("hidden", router)
    assert parse_recipe(text).notes == ()
    with pytest.raises(MergeKitError, match=f"router: {router} needs"):
        parse_recipe(text.replace(", positive_prompts: [y]", ""))


@pytest.mark.parametrize("router", ["hidden", "hidden_avg", "cheap_embed"])
def test_a_shared_expert_needs_no_prompts(router):
    read = stage(TWO.replace("hidden", router) + "shared_experts: [{model: b}]\n")
    assert [entry.prompts for entry in read.shared_experts] == [None]


def test_experts_that_are_one_model_are_noted():
    text = START.replace("hidden", "zero") + "  - {model: a}\n  - {model: a}\n"
    (note,) = parse_recipe(text).notes
    assert "which one a token passes means nothing until trained" in note
    noisy = text.replace("{model: a}", "{model: a, parameters: {noise_scale: 0.1}}", 1)
    assert parse_recipe(noisy).notes == ()


@pytest.mark.parametrize(
    "more",
    [
        "merge_method: linear\nmodels: [{model: a, positive_prompts: [x]}]",
        "merge_method: sparse_upcycle\nmodules: {x: {models: [{model: a, positive_prompts: [x]}]}}",
        "base_model: b\ntensors: [{match: x, models: [{model: a, positive_prompts: [x]}]}]",
        "merge_method: ties\nslices: [{sources: [{model: a, layers: [0], positive_prompts: [x]}]}]",
    ],
)
def test_prompts_elsewhere_are_refused_with_the_place_where_they_belong(more):
    with pytest.raises(MergeKitError) as caught:
        parse_recipe(more)
    assert "unknown key 'positive_prompts'" in str(caught.value)
    assert "prompts are for the models of a sparse_upcycle" in str(caught.value)


def test_shared_experts_of_another_method_are_refused():
    text = "merge_method: linear\nmodels: [{model: a}]\nshared_experts: [{model: b}]\n"
    with pytest.raises(MergeKitError, match="3:1: shared_experts has no meaning with linear"):
        parse_recipe(text)


def test_an_unknown_method_is_all_that_is_said_of_a_recipe_with_prompts():
    with pytest.raises(MergeKitError) as caught:
        parse_recipe(TWO.replace("sparse_upcycle", "sparse_upcycled"))
    assert "unknown merge method 'sparse_upcycled'" in str(caught.value)
    assert "prompts" not in str(caught.value)


def of(texts):
    model = {"model": "a", "positive_prompts": texts}
    return {"merge_method": "sparse_upcycle", "base_model": "base", "models": [model]}


def test_texts_are_bounded_in_number_and_length():
    recipe_from_mapping(of(["x"] * MAX_PROMPTS))
    recipe_from_mapping(of(["x" * MAX_BYTES]))
    with pytest.raises(MergeKitError, match="a list of 1001, expected at most 1,000 texts"):
        recipe_from_mapping(of(["x"] * (MAX_PROMPTS + 1)))
    with pytest.raises(MergeKitError, match="has 8,194 bytes, expected at most 8,192"):
        recipe_from_mapping(of(["é" * (MAX_BYTES // 2 + 1)]))


def test_half_a_character_is_refused():
    with pytest.raises(MergeKitError, match=r"positive_prompts\.0 holds half a character"):
        recipe_from_mapping(of(["\ud83d"]))


def test_letters_of_every_script_and_line_ends_are_kept():
    texts = ("größe\n", "数学 😀", "- [x]: {y}")
    recipe = recipe_from_mapping(of(texts))
    assert recipe.stages[0].models[0].prompts == Prompts(texts)
    again = parse_recipe(recipe.text)
    assert again.stages[0].models[0].prompts == Prompts(texts)


def test_prompts_are_set_from_outside():
    changed = parse_recipe(TWO, overrides=["models.0.positive_prompts=[other, more]"])
    assert changed.stages[0].models[0].prompts == Prompts(("other", "more"))
    with pytest.raises(MergeKitError, match=r"--set models\.0\.positive_prompts=4"):
        parse_recipe(TWO, overrides=["models.0.positive_prompts=4"])
