"""Recipes of mergekit-moe, read unchanged: what they mean here, and what is wrong with them."""

from __future__ import annotations

import contextlib

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from merge_kit.errors import MergeKitError, Problems
from merge_kit.recipe import parse_recipe, recipe_from_mapping, recipe_schema
from merge_kit.recipe.experts import GATE_MODES, SIGNS
from merge_kit.recipe.keys import MOE_EXPERT_KEYS, MOE_KEYS
from merge_kit.recipe.values import Prompts

RECIPE = """\
base_model: org/base@v1
gate_mode: cheap_embed # of the embeddings
dtype: bfloat16
experts_per_token: 1
experts:
  - source_model: org/code
    positive_prompts:
      - "def f(x):"
      - import os
    negative_prompts: [once upon a time]
    noise_scale: 1e-3
  - source_model: {model: org/math, lora: org/lora}
    positive_prompts: ["1 + 1 ="]
    residual_scale: 0.5
"""
PLAIN = """\
base_model: base
experts:
  - {source_model: a, positive_prompts: [x]}
  - {source_model: b, positive_prompts: [y]}
"""
SHARED = PLAIN + "shared_experts:\n  - {source_model: base, positive_prompts: [z]}\n"


def stage(text, **options):
    return parse_recipe(text, **options).stages[-1]


def parameters(made):
    return {name: setting.at("", 0.0) for name, setting in made.parameters.items()}


def fits(text):
    return Draft202012Validator(recipe_schema()).is_valid(yaml.safe_load(text))


def test_every_key_becomes_what_it_means():
    made = stage(RECIPE)
    assert (made.merge_method, made.dtype) == ("sparse_upcycle", "BF16")
    assert (made.base_model.path, made.base_model.revision) == ("org/base", "v1")
    code, maths = made.models
    assert (code.model.path, maths.model.path) == ("org/code", "org/math")
    assert maths.model.adapters == ("org/lora",)
    assert code.prompts == Prompts(("def f(x):", "import os"), ("once upon a time",))
    assert maths.prompts == Prompts(("1 + 1 =",))
    assert parameters(code) == {"noise_scale": 1e-3}
    assert parameters(maths) == {"residual_scale": 0.5}
    assert parameters(made) == {"router": "cheap_embed", "num_experts": 2, "experts_per_token": 1}
    assert fits(RECIPE)


def test_what_is_left_out_is_as_mergekit_moe_has_it():
    made = stage(PLAIN)
    assert parameters(made) == {"router": "hidden", "num_experts": 2, "experts_per_token": 2}
    assert (made.dtype, made.shared_experts) == (None, ())
    empty = (
        PLAIN + "gate_mode:\nexperts_per_token: null\ndtype: ~\narchitecture:\nshared_experts: []"
    )
    assert parameters(stage(empty)) == parameters(made)
    assert fits(empty)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("hidden", {"router": "hidden"}),
        ("hidden_avg", {"router": "hidden_avg"}),
        ("hidden_last", {"router": "hidden"}),
        ("cheap_embed", {"router": "cheap_embed"}),
        ("random", {"router": "random", "router_scale": 1.0}),  # a standard normal there
        ("uniform_random", {"router": "uniform_random"}),  # of half-width 1/sqrt(h) by default
    ],
)
def test_gate_modes_are_routers(mode, expected):
    made = parameters(stage(PLAIN + f"gate_mode: {mode}\n"))
    assert made == {**expected, "num_experts": 2, "experts_per_token": 2}
    assert set(GATE_MODES) >= {mode}


@pytest.mark.parametrize("mode", ["random", "uniform_random"])
def test_random_gates_need_no_prompts(mode):
    text = f"base_model: base\ngate_mode: {mode}\n"
    text += "experts: [{source_model: a}, {source_model: b}]\n"
    assert parse_recipe(text).notes == ()
    assert [entry.prompts for entry in stage(text).models] == [None, None]
    alike = PLAIN.replace("[y]", "[x]") + f"gate_mode: {mode}\n"
    assert [entry.prompts for entry in stage(alike).models] == [Prompts(("x",))] * 2


@pytest.mark.parametrize("mode", ["hidden", "hidden_last", "hidden_avg", "cheap_embed"])
def test_other_gates_need_prompts_that_differ(mode):
    text = PLAIN + f"gate_mode: {mode}\n"
    with pytest.raises(MergeKitError, match="3:5: 'a' has no positive_prompts, which gate_mode: "):
        parse_recipe(text.replace(", positive_prompts: [x]", ""))
    with pytest.raises(MergeKitError, match="4:5: all experts have the same prompts"):
        parse_recipe(text.replace("[y]", "[x]"))
    other = text.replace("[y]", "[x], negative_prompts: [x]")
    assert len(stage(other).models) == 2


@pytest.mark.parametrize(
    ("written", "has_shared", "layout"),
    [
        ("Mixtral", False, "mixtral"),
        ("mix", False, "mixtral"),
        ("QWEN MOE", True, "qwen2_moe"),
        ("qwen moe", False, "qwen2_moe"),
        ("Qwen3 MoE", False, "qwen3_moe"),
        ("qwen3", False, "qwen3_moe"),
        ("qwen", True, "qwen2_moe"),
        ("qwen", False, "qwen3_moe"),
        (None, True, "qwen2_moe"),
        (None, False, None),  # that of the base's model_type
    ],
)
def test_an_architecture_is_what_a_layout_begins_with(written, has_shared, layout):
    text = SHARED if has_shared else PLAIN
    text += f"architecture: {written}\n" if written else ""
    assert parameters(stage(text)).get("architecture") == layout
    assert len(stage(text).shared_experts) == has_shared
    assert fits(text)


def test_a_shared_expert_has_prompts_and_scales():
    text = SHARED.replace("[z]", "[z], noise_scale: 0.1, residual_scale: 2")
    (shared,) = stage(text).shared_experts
    assert (shared.model.path, shared.prompts) == ("base", Prompts(("z",)))
    assert parameters(shared) == {"noise_scale": 0.1, "residual_scale": 2.0}


def test_one_expert_is_one_and_no_copies():
    text = PLAIN.replace("  - {source_model: b, positive_prompts: [y]}\n", "experts_per_token: 1\n")
    assert parameters(stage(text))["num_experts"] == 1


def test_a_model_may_be_two_experts():
    assert [entry.model.path for entry in stage(PLAIN.replace(": b,", ": a,")).models] == ["a", "a"]
    (note,) = parse_recipe(PLAIN.replace(": b,", ": a,")).notes
    assert "all experts are one model" in note


def test_keys_of_the_output_and_of_stages_stand_beside():
    recipe = parse_recipe(PLAIN + "seed: 7\nshard_size: 1MB\noutput: merged/moe\n")
    assert (recipe.seed, recipe.shard_size_bytes, recipe.output) == (7, 10**6, "merged/moe")
    text = PLAIN + "name: moe\n---\nmerge_method: linear\nmodels:\n"
    text += "  - {model: moe, parameters: {weight: 1}}\n"
    assert [one.name for one in parse_recipe(text).stages] == ["moe", None]
    mean = "---\nname: a\nmerge_method: linear\nmodels: [{model: c, parameters: {weight: 1}}]\n"
    assert [one.merge_method for one in parse_recipe(PLAIN + mean).stages] == [
        "linear",
        "sparse_upcycle",
    ]
    (note,) = parse_recipe(PLAIN + "name: alone\n").notes
    assert "name has no effect" in note


def test_values_are_set_from_outside():
    made = stage(RECIPE, overrides=["experts.0.noise_scale=0.1", "gate_mode=random"])
    assert parameters(made.models[0]) == {"noise_scale": 0.1}
    assert parameters(made)["router"] == "random"
    made = stage(PLAIN, overrides=["experts.1.positive_prompts=[one, two]", "experts_per_token=1"])
    assert made.models[1].prompts == Prompts(("one", "two"))
    recipe = parse_recipe(RECIPE, overrides=["experts.0.residual_scale=0.5"])
    assert parameters(parse_recipe(recipe.text).stages[0].models[0])["residual_scale"] == 0.5
    with pytest.raises(MergeKitError, match="a recipe has no key 'expert'") as caught:
        parse_recipe(PLAIN, overrides=["expert.0.noise_scale=1"])
    assert "did you mean 'experts'?" in str(caught.value)
    with pytest.raises(MergeKitError, match=r"--set experts\.0\.noise_scale=much: noise_scale is"):
        parse_recipe(PLAIN, overrides=["experts.0.noise_scale=much"])


def test_a_mapping_is_read_as_text_is():
    made = recipe_from_mapping(yaml.safe_load(RECIPE))
    assert parameters(made.stages[0]) == parameters(stage(RECIPE))
    assert made.stages[0].models[0].prompts == stage(RECIPE).models[0].prompts


def test_dead_keys_are_noted():
    (note,) = parse_recipe(PLAIN + "int8_mask: true\n", source="r.yaml").notes
    assert note.startswith("r.yaml:5:1: int8_mask has no effect")


def test_values_keep_their_places():
    made = stage(RECIPE, source="r.yaml")
    assert str(made.parameters["router"].mark) == "r.yaml:2:12"
    assert str(made.models[0].parameters["noise_scale"].mark) == "r.yaml:11:18"
    assert str(made.models[1].mark) == "r.yaml:12:5"


WRONG = {
    "unknown": (PLAIN + "gate_mod: random", "5:1: unknown key 'gate_mod'", "'gate_mode'?"),
    "unknown in an expert": (
        PLAIN.replace("positive_prompts: [x]", "positve_prompts: [x]"),
        "3:23: unknown key 'positve_prompts' in experts.0",
        "did you mean 'positive_prompts'?",
    ),
    "model": (PLAIN.replace("source_model: a", "model: a"), "3:6: unknown key 'model'", "source_"),
    "parameters": (
        PLAIN.replace("[x]", "[x], parameters: {noise_scale: 1}"),
        "3:46: unknown key 'parameters' in experts.0",
        "write noise_scale: NUMBER",
    ),
    "other keys": (
        PLAIN + "tokenizer_source: union",
        "5:1: unknown key 'tokenizer_source'",
        "merge_method: sparse_upcycle",
    ),
    "models": (PLAIN + "models: [{model: a}]", "5:1: unknown key 'models'", "sparse_upcycle"),
    "no base": (PLAIN.replace("base_model: base\n", ""), "1:1: base_model is missing", ""),
    "no experts": ("base_model: a\ngate_mode: random", "1:1: experts is missing", ""),
    "empty": (
        "base_model: a\nexperts: []",
        "2:10: experts is an empty list, expected at least",
        "",
    ),
    "no list": (
        "base_model: a\nexperts: {x: y}",
        "2:10: experts is a mapping, expected a list",
        "",
    ),
    "no mapping": (
        "base_model: a\nexperts: [b, c]",
        "2:11: experts.0 is 'b', expected a mapping",
        "",
    ),
    "no source": (PLAIN.replace("source_model: a, ", ""), "3:5: source_model is missing", ""),
    "gate_mode": (PLAIN + "gate_mode: hiden", "5:12: gate_mode is 'hiden'", "mean 'hidden'?"),
    "gate_mode list": (PLAIN + "gate_mode: [hidden]", "5:12: gate_mode is a list of 1", ""),
    "router": (PLAIN + "gate_mode: zero", "5:12: gate_mode is 'zero', expected hidden or", ""),
    "too many a token": (
        PLAIN + "experts_per_token: 3",
        "5:20: experts_per_token is 3, expected from 1 to the number of experts, 2",
        "",
    ),
    "none a token": (PLAIN + "experts_per_token: 0", "5:20: experts_per_token is 0", ""),
    "half a token": (PLAIN + "experts_per_token: 1.5", "5:20: experts_per_token is 1.5", ""),
    "below": (
        PLAIN + "experts_per_token: -1",
        "5:20: experts_per_token is -1, expected a whole",
        "",
    ),
    "one expert": (
        "base_model: a\nexperts: [{source_model: b, positive_prompts: [x]}]",
        "2:10: experts_per_token is 2, expected from 1 to the number of experts, 1",
        "write experts_per_token: 1",
    ),
    "dtype": (PLAIN + "dtype: bf16", "5:8: dtype is 'bf16'", "did you mean 'bfloat16'?"),
    "noise": (PLAIN.replace("[x]", "[x], noise_scale: lots"), "3:59: noise_scale is 'lots'", ""),
    "infinite": (PLAIN.replace("[x]", "[x], residual_scale: .inf"), "3:62: residual_scale is", ""),
    "prompt": (PLAIN.replace("[x]", "x"), "3:41: positive_prompts is 'x', expected a list", "dash"),
    "architecture": (PLAIN + "architecture: Mistral", "5:15: architecture is 'Mistral'", "Mixtral"),
    "architecture number": (PLAIN + "architecture: 3", "5:15: architecture is 3", ""),
    "deepseek": (
        PLAIN + "architecture: DeepSeek MoE",
        "5:15: DeepSeek MoE is not written",
        "write architecture: Mixtral, or Qwen MoE",
    ),
    "deep": (SHARED + "architecture: deep", "7:15: DeepSeek MoE is not written", ""),
    "shared of Mixtral": (
        SHARED + "architecture: mixtral",
        "7:15: Mixtral has no shared expert",
        "write architecture: Qwen MoE",
    ),
    "shared of Qwen3": (SHARED + "architecture: Qwen3", "7:15: Qwen3 MoE has no shared expert", ""),
    "shared with negative prompts": (
        SHARED.replace("positive_prompts: [z]", "negative_prompts: [z]"),
        "6:5: 'base' has no positive_prompts, which gate_mode: hidden needs",
        "",
    ),
    "two shared": (
        SHARED + "  - {source_model: a, positive_prompts: [q]}\n",
        "6:3: shared_experts is a list of 2, expected one model",
        "",
    ),
    "shared model": (
        SHARED.replace("source_model: base", "model: base"),
        "6:6: unknown key 'model' in shared_experts.0",
        "write source_model",
    ),
    "with a method": (
        "merge_method: sparse_upcycle\n" + PLAIN,
        "3:1: unknown key 'experts'",
        "has no merge_method",
    ),
    "an empty method": ("merge_method:\n" + PLAIN, "3:1: unknown key 'experts'", ""),
}


@pytest.mark.parametrize("row", WRONG)
def test_what_is_wrong_is_said_at_its_place(row):
    text, message, hint = WRONG[row]
    with pytest.raises(MergeKitError) as caught:
        parse_recipe(text, source="r.yaml")
    assert f"r.yaml:{message}" in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize("key", [*MOE_KEYS, *MOE_EXPERT_KEYS])
def test_whatever_a_key_holds_is_read_or_refused(key):
    for value in ("[]", "{}", "[~]", "{a: [b]}", "~", "''", "-1", ".nan", "true", "2020-01-01"):
        place = f"{key}: {value}\n" if key in MOE_KEYS else ""
        inside = "" if place else f", {key}: {value}"
        text = f"{place}experts: [{{source_model: a{inside}}}, {{source_model: b}}]\n"
        text += "base_model: base\ngate_mode: random\n"
        with contextlib.suppress(MergeKitError):
            recipe_from_mapping(yaml.load(text, yaml.BaseLoader))
        with contextlib.suppress(MergeKitError):
            parse_recipe(text)


def test_several_problems_come_in_one_list():
    text = PLAIN.replace("[x]", "7").replace("[y]", "[3]") + "dtype: int4\ngate_mode: none\n"
    with pytest.raises(Problems) as caught:
        parse_recipe(text)
    assert len(caught.value.errors) == 4


def test_a_prompt_may_be_empty_as_published_recipes_have_it():
    recipe = parse_recipe(PLAIN.replace("[x]", "['']") + "gate_mode: random\n")
    (stage,) = recipe.stages
    assert stage.models[0].prompts == Prompts(("",))


SEED = f"""\
name: middle
{PLAIN}---
{RECIPE.replace("org/math", "middle")}{SHARED.removeprefix(PLAIN)}architecture: qwen
seed: 3
""".encode()
WORDS = [b"&x ", b"*x", b"<<: ", b"[", b"]", b"{", b"}", b": ", b"- ", b"!!int ", b"null", b".nan"]
WORDS += [key.encode() for key in (*MOE_KEYS, *MOE_EXPERT_KEYS, "merge_method: linear\n")]


@st.composite
def mutated(draw):
    """The seed with a few bytes, words and lines put in, taken out or doubled."""
    text = bytearray(SEED)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(text)))
        kind = draw(st.sampled_from(("byte", "delete", "word", "line")))
        if kind == "byte":
            text[at : at + 1] = draw(st.binary(min_size=1, max_size=2))
        elif kind == "delete":
            del text[at : at + draw(st.integers(1, 30))]
        elif kind == "word":
            text[at:at] = draw(st.sampled_from(WORDS))
        else:
            lines = bytes(text).split(b"\n")
            line = draw(st.integers(0, len(lines) - 1))
            text = bytearray(b"\n".join([*lines[: line + 1], *lines[line:]]))
    return bytes(text)


@settings(max_examples=200, deadline=None)
@given(mutated())
def test_mutated_recipes_are_read_or_refused(content):
    with contextlib.suppress(MergeKitError):
        parse_recipe(content.decode("utf-8", "surrogateescape"))


def test_the_seed_itself_is_read():
    recipe = parse_recipe(SEED.decode())
    assert [stage.name for stage in recipe.stages] == ["middle", None]
    assert len(recipe.stages[1].shared_experts) == 1


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*MOE_KEYS, *MOE_EXPERT_KEYS]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(list(MOE_KEYS)), VALUES), st.sampled_from(SIGNS), VALUES)
def test_any_mapping_is_read_or_refused(mapping, sign, value):
    with contextlib.suppress(MergeKitError):
        recipe_from_mapping({**mapping, sign: value})


def test_the_schema_refuses_what_the_reader_refuses():
    for text in (
        PLAIN + "gate_mod: random",
        PLAIN + "gate_mode: zero",
        PLAIN + "models: []",
        PLAIN.replace("source_model: a", "model: a"),
        PLAIN.replace("base_model: base\n", ""),
        PLAIN.replace("[x]", "x"),
        PLAIN.replace("[x]", "[3]"),
        "base_model: a\nexperts: []",
        SHARED + "  - {source_model: a, positive_prompts: [q]}\n",
        "merge_method: sparse_upcycle\n" + PLAIN,
    ):
        assert not fits(text), text
        with pytest.raises(MergeKitError):
            parse_recipe(text)
