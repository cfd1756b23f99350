from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.errors import RecipeError
from merge_kit.plan.values import PlanInput
from merge_kit.publish.recipes import portable_recipe, recipe_hash
from merge_kit.publish.references import without_homes

BASE = PlanInput("input-1", "base", "../models/base", Path("/home/alice/models/base"), ())
CODE = PlanInput("input-2", "code", "/data/code@v1", Path("/data/code"), ())
HUB = PlanInput("input-3", "math", "org/math", Path("/cache/x"), (), "org/math", "abc")
INPUTS = (BASE, CODE, HUB)


def shown(text, inputs=INPUTS):
    return yaml.safe_load(portable_recipe(text, inputs))


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("../models/base", "input-1:base"),
        ("./base", "input-1:base"),
        ("~/models/base", "input-1:base"),
        ("/home/alice/models/base/", "input-1:base"),
        ("/data/code@v1", "input-2:code"),
        ("/data/code", "input-2:code"),
        ("org/math", "org/math"),
        ("org/math@abc", "org/math@abc"),
        ("org/other", "org/other"),
        ("org/math+/data/code", "org/math+input-2:code"),
        ("../models/base+org/lora@v2", "input-1:base+org/lora@v2"),
        ("/home/alice/elsewhere", "local:elsewhere"),
        ("/home/alice/elsewhere@v1", "local:elsewhere@v1"),
        ("a/b/elsewhere", "local:elsewhere"),
        ("C:\\Users\\alice\\elsewhere", "local:elsewhere"),
        ("~alice/elsewhere", "local:elsewhere"),
    ],
)
def test_local_references_become_keys_and_hub_ids_stay(reference, expected):
    assert shown(yaml.safe_dump({"base_model": reference})) == {"base_model": expected}


def test_a_reference_is_found_wherever_the_dialect_has_one():
    recipe = {
        "slices": [
            {"sources": [{"model": "/data/code", "layer_range": [0, 2]}], "base_model": "base"}
        ],
        "modules": {"model": {"models": [{"model": {"model": {"path": "/data/code"}}}]}},
        "tensors": [{"match": "*", "copy": "/data/code"}],
        "tokenizer": {"source": "/data/code"},
        "models": [{"model": {"model": "org/math", "lora": ["/data/code", "/x/lora"]}}],
    }
    text = portable_recipe(yaml.safe_dump(recipe), INPUTS)
    assert "/data" not in text
    found = yaml.safe_load(text)
    assert found["slices"][0]["base_model"] == "input-1:base"
    assert found["modules"]["model"]["models"][0]["model"]["model"]["path"] == "input-2:code"
    assert found["tensors"] == [{"match": "*", "copy": "input-2:code"}]
    assert found["models"][0]["model"]["lora"] == ["input-2:code", "local:lora"]


def test_the_words_of_the_tokenizer_and_the_names_of_stages_stay():
    text = (
        "name: base\nmodels: [{model: org/math}]\n---\nbase_model: base\ntokenizer_source: union\n"
    )
    first, second = yaml.safe_load_all(portable_recipe(text, INPUTS))
    assert first == {"name": "base", "models": [{"model": "org/math"}]}
    assert second == {"base_model": "base", "tokenizer_source": "union"}
    assert shown("{tokenizer_source: base, base_model: base}") == {
        "tokenizer_source": "base",
        "base_model": "input-1:base",
    }


def test_parameters_keep_their_values():
    text = "parameters: {weight: [{filter: /self_attn, value: 1e-3}, {value: 0.50}], model: /x/y}\n"
    assert portable_recipe(text, INPUTS) == text


def test_output_comments_and_home_directories_are_left_out():
    text = "# by alice\noutput: /home/alice/out  # mine\nchat_template: 'see /home/alice/t.jinja'\n"
    assert shown(text) == {"output": "out", "chat_template": "see ~/t.jinja"}
    assert "alice" not in portable_recipe(text, INPUTS)


def test_home_directories_are_told_from_names_like_them(monkeypatch):
    monkeypatch.setenv("HOME", "/srv/people/bob")
    text = "/srv/people/bob /srv/people/bobby /root/x model/root/x /Users/eve/x /roots"
    assert without_homes(text) == "~ /srv/people/bobby ~/x model/root/x ~/x /roots"


def test_aliases_and_merge_keys_are_kept():
    text = "a: &m {model: /data/code}\nmodels: [*m, {<<: *m}]\n"
    assert shown(text)["models"] == [{"model": "input-2:code"}, {"model": "input-2:code"}]


def test_a_hub_model_that_is_named_by_its_folder_gets_its_id():
    hub = replace(HUB, text="/cache/x")
    assert shown("base_model: /cache/x", (hub,)) == {"base_model": "org/math@abc"}


@given(name=st.text(min_size=1).filter(lambda name: "/" not in name and "\0" not in name))
def test_any_name_of_a_folder_gives_one_plain_text(name):
    model = PlanInput("input-1", name, f"/home/alice/{name}", Path("/home/alice") / name, ())
    if name in (".", ".."):
        return
    text = yaml.safe_dump({"base_model": f"/home/alice/{name}", "merge_method": "linear"})
    found = shown(text, (model,))
    assert found.keys() == {"base_model", "merge_method"}
    assert found["base_model"].startswith("input-1:")
    assert found["base_model"].isprintable()


@given(
    recipe=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)
def test_whatever_holds_no_reference_and_no_path_means_the_same(recipe):
    text = yaml.safe_dump({"parameters": recipe}, allow_unicode=True)
    assert shown(text) == yaml.safe_load(text)
    assert recipe_hash(text) == recipe_hash(portable_recipe(text, INPUTS))


def test_the_hash_does_not_see_layout_places_and_comments():
    one = "merge_method: linear\nmodels: [{model: /home/alice/base, parameters: {weight: 1}}]\n"
    other = (
        "# hi\nmodels:\n- parameters: {weight: 1.0}\n  model: base\nmerge_method: linear\noutput: x"
    )
    assert recipe_hash(one) == recipe_hash(other)
    assert len(recipe_hash(one)) == 32


@pytest.mark.parametrize(
    "other",
    [
        "{merge_method: linear, models: [{model: b}, {model: a}]}",
        "{merge_method: linear, models: [{model: a}]}",
        "{merge_method: slerp, models: [{model: a}, {model: b}]}",
        "{merge_method: linear, models: [{model: a}, {model: b}], seed: 1}",
        "{merge_method: linear, models: [{model: a@v1}, {model: b}]}",
        "{name: x, merge_method: linear, models: [{model: a}, {model: b}]}",
        "{merge_method: linear, models: [{model: a}, {model: b}], modules: {output: {}}}",
    ],
)
def test_the_hash_sees_what_a_recipe_says(other):
    assert recipe_hash("{merge_method: linear, models: [{model: a}, {model: b}]}") != recipe_hash(
        other
    )
    modules = "modules: {output: {models: [{model: a}]}}"
    assert recipe_hash(modules) != recipe_hash("modules: {}")


def test_the_hash_of_a_portable_recipe_is_that_of_the_recipe():
    text = (
        "models: [{model: ../models/base}, {model: /data/code@v1}, {model: org/math}]\noutput: /x/y"
    )
    assert recipe_hash(portable_recipe(text, (BASE, replace(CODE, text="/data/code"), HUB))) == (
        recipe_hash(text)
    )


def test_aliases_of_aliases_do_not_take_for_ever():
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    assert len(recipe_hash("\n".join(lines))) == 32


@pytest.mark.parametrize("text", ["a: [", "a: &a [*a]", "[" * 500])
def test_what_is_no_recipe_is_an_error_in_words(text):
    with pytest.raises(RecipeError):
        recipe_hash(text)
