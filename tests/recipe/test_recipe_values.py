"""What a right recipe becomes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from merge_kit.core.layers import LayerRange
from merge_kit.errors import RecipeError, UsageError
from merge_kit.recipe import load_recipe, parse_recipe, recipe_from_mapping
from merge_kit.recipe.values import ModelRef, Rule

HEAD = "merge_method: linear\nmodels:\n- model: a\n  parameters: {weight: 1}\n"


def stage_of(text, **options):
    return parse_recipe(text, source="r.yaml", **options).stages[-1]


def rules_of(value, name="weight"):
    text = f"{HEAD}parameters:\n  {name}: {value}\n"
    setting = stage_of(text).parameters.get(name)
    return setting and setting.rules


def test_models_with_weights():
    recipe = parse_recipe(HEAD + "- {model: b, parameters: {weight: 0.5}}\ndtype: torch.bfloat16\n")
    stage = recipe.stages[0]
    assert [entry.model.path for entry in stage.models] == ["a", "b"]
    assert stage.models[1].parameters["weight"].rules == (Rule((0.5,)),)
    assert (stage.merge_method, stage.dtype, stage.out_dtype) == ("linear", "BF16", None)
    assert (recipe.seed, recipe.shard_size_bytes, recipe.output) == (0, 5_000_000_000, None)
    assert recipe.notes == ()


@pytest.mark.parametrize(
    ("written", "rules"),
    [
        ("3", (Rule((3.0,)),)),
        ("1e-3", (Rule((0.001,)),)),  # text in YAML 1.1
        ("'0.25'", (Rule((0.25,)),)),
        ("true", (Rule((1.0,)),)),
        ("[0, 1]", (Rule((0.0, 1.0)),)),
        ("[]", None),
        ("{value: 2}", (Rule((2.0,)),)),
        ("{filter: mlp, value: [1, 2]}", (Rule((1.0, 2.0), "mlp"),)),
        ("[{filter: mlp, value: 2}, {filter: , value: 3}]", (Rule((2.0,), "mlp"), Rule((3.0,)))),
    ],
)
def test_every_form_of_a_number(written, rules):
    assert rules_of(written) == rules


@pytest.mark.parametrize("written", ["true", "1", "1.0", "'true'", "yes", "'1'"])
def test_every_form_of_true(written):
    assert rules_of(written, "normalize") == (Rule((True,)),)


def test_a_gradient_of_bools_holds_bools():
    assert rules_of("[1, 0]", "normalize") == (Rule((True, False)),)


def test_layer_ranges_are_whole_numbers_however_written():
    text = "merge_method: passthrough\nslices:\n"
    text += "- sources: [{model: a, layer_range: ['0', 2.0]}]\n"
    text += "- sources: [{model: a, layer_range: [5, 5]}]\n  residual_weight: 3\n"
    recipe = parse_recipe(text)
    layers = [part.sources[0].layers for part in recipe.stages[0].slices]
    assert layers == [LayerRange(0, 2), LayerRange(5, 5)]
    assert "residual_weight has no effect" in recipe.notes[0]


def test_modules_keep_their_order_and_levels():
    stage = stage_of(
        "merge_method: passthrough\nmodules:\n"
        "  text: {models: [{model: a}], parameters: {scale: 2}}\n"
        "  vision: {slices: [{sources: [{model: b, layer_range: [0, 2]}], base_model: c}]}\n"
    )
    assert [module.name for module in stage.modules] == ["text", "vision"]
    assert stage.modules[0].parameters["scale"].rules == (Rule((2.0,)),)
    assert stage.modules[1].slices[0].base_model == ModelRef("c")


def test_null_and_empty_mean_not_given():
    stage = stage_of(HEAD + "slices: []\nmodules:\nbase_model: null\nchat_template: ~\ndtype:\n")
    assert (stage.slices, stage.modules, stage.base_model, stage.dtype) == ((), (), None, None)


def test_merge_keys_and_aliases_are_expanded_and_keep_their_places():
    text = "merge_method: linear\nmodels:\n- &one\n  model: a\n  parameters: &p {weight: 1}\n"
    text += "- {<<: *one, model: b}\n- {model: c, parameters: *p}\n"
    models = stage_of(text).models
    assert [entry.model.path for entry in models] == ["a", "b", "c"]
    assert {entry.parameters["weight"].mark.line for entry in models} == {5}


@pytest.mark.parametrize(
    ("written", "source"),
    [
        ("tokenizer_source: base", "base"),
        ("tokenizer_source: union", "union"),
        ("tokenizer_source: m@v1", ModelRef("m", "v1")),
        ("tokenizer: {}", "union"),
        ("tokenizer: {source: base}", "base"),
        ("tokenizer: {source: {model: {path: m}}, tokens: null}", ModelRef("m")),
    ],
)
def test_tokenizer_choices(written, source):
    choice = stage_of(HEAD + written)
    assert choice.tokenizer.source == source


def test_keys_of_the_output():
    recipe = parse_recipe(HEAD + "seed: '7'\nshard_size: 2GiB\noutput: merged/x\n")
    assert (recipe.seed, recipe.shard_size_bytes, recipe.output) == (7, 2**31, "merged/x")


def test_arguments_win_over_the_recipe():
    recipe = parse_recipe(HEAD + "seed: 7\nshard_size: 2GiB\n", seed=3, shard_size="1MB")
    assert (recipe.seed, recipe.shard_size_bytes) == (3, 1_000_000)


@pytest.mark.parametrize("arguments", [{"seed": -1}, {"seed": 2**63}, {"shard_size": "big"}])
def test_wrong_arguments_are_usage_errors(arguments):
    with pytest.raises(UsageError):
        parse_recipe(HEAD, **arguments)


def test_tensor_rules_in_order():
    stage = stage_of(
        "merge_method: linear\nbase_model: a\nmodels: [{model: b}]\non_conflict: first\n"
        "parameters: {weight: 1, t: 0.5}\ntensors:\n"
        "- {match: '*.norm.*', copy: b}\n- {match: '*.bias', drop: true}\n"
        "- {match: '*.mlp.*', merge_method: slerp, parameters: {flatten: false}}\n"
        "- {match: 'lm_head*', models: [{model: c, parameters: {weight: 2}}]}\n- {match: 'x'}\n"
    )
    copy, drop, slerp, models, same = stage.tensors
    assert (copy.match, copy.copy, drop.drop, drop.copy) == ("*.norm.*", ModelRef("b"), True, None)
    assert (slerp.merge_method, slerp.models) == ("slerp", None)
    assert slerp.parameters["flatten"].rules == (Rule((False,)),)
    assert models.models[0].parameters["weight"].rules == (Rule((2.0,)),)
    assert (same.merge_method, same.copy, same.drop, same.models) == (None, None, False, None)
    assert stage.on_conflict == "first"
    assert stage.parameters["t"].rules == (Rule((0.5,)),)


def test_a_parameter_that_a_rules_method_reads_is_checked_and_not_noted():
    text = "merge_method: passthrough\nbase_model: a\nmodels: [{model: a}]\nparameters: {t: %s}\n"
    text += "tensors: [{match: x, merge_method: slerp, models: [{model: b}]}]\n"
    assert parse_recipe(text % "0.5").notes == ()
    with pytest.raises(RecipeError, match="t is 'x'"):
        parse_recipe(text % "x")


@pytest.mark.parametrize(
    ("rule", "method"),
    [
        ("{match: x, copy: b}", "passthrough"),
        (
            "{match: x, merge_method: slerp, models: [{model: b}], parameters: {t: 1}}",
            "passthrough",
        ),
        ("{match: x, models: [{model: b, parameters: {weight: 1}}]}", "linear"),
    ],
)
def test_tensors_alone_need_no_method(rule, method):
    stage = stage_of(f"base_model: a\ntensors: [{rule}]\n")
    assert stage.merge_method == method
    assert (stage.models, stage.slices, stage.modules) == ((), (), ())


def test_notes_for_what_has_no_effect():
    recipe = parse_recipe(
        "merge_method: slerp\nbase_model: a\nname: x\n"
        "models: [{model: b, parameters: {t: 0.5}}]\nparameters: {t: 1, weight: 2}\n",
        source="r.yaml",
    )
    assert [note.partition(" (")[0] for note in recipe.notes] == [
        "r.yaml:4:34: t has no effect under a model",
        "r.yaml:5:20: weight has no effect with slerp",
        "r.yaml:3:1: name has no effect",
    ]
    assert recipe.stages[0].name is None


def test_text_is_kept_as_it_was():
    text = "# mine\n" + HEAD + "---\n"
    assert parse_recipe(text).text == text


def test_a_mapping_gives_the_recipe_of_its_text():
    mapping = {"merge_method": "linear", "seed": 3, "models": [{"model": Path("a")}]}
    mapping["parameters"] = {"weight": (0, "1e-3")}
    recipe = recipe_from_mapping(mapping, folder=Path("here"))
    assert yaml.safe_load(recipe.text)["parameters"] == {"weight": [0, "1e-3"]}
    again = parse_recipe(recipe.text)
    assert again.seed == recipe.seed == 3
    assert again.stages[0].models[0].model == recipe.stages[0].models[0].model == ModelRef("a")
    assert recipe.stages[0].parameters["weight"].rules == (Rule((0.0, 0.001)),)
    assert recipe.folder == Path("here")


def test_a_file_is_read_and_its_folder_known(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + HEAD.encode())
    recipe = load_recipe(path)
    assert (recipe.source, recipe.folder, recipe.text) == (str(path), tmp_path, HEAD)


def test_files_that_cannot_be_recipes(tmp_path):
    with pytest.raises(UsageError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="this is a folder"):
        load_recipe(tmp_path)
    with pytest.raises(UsageError, match="cannot read"):
        load_recipe(Path("a\0b"))
    path = tmp_path / "r.yaml"
    path.write_bytes(b"name: x\nname: \xff\n")
    with pytest.raises(RecipeError, match="found the byte 0xFF, expected UTF-8") as caught:
        load_recipe(path)
    assert caught.value.where == f"{path}:2:7"
    path.write_bytes(b"\xff" * 1_000_001)
    with pytest.raises(RecipeError, match="larger than 1 MB"):
        load_recipe(path)
