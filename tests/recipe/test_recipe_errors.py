"""Each way in which a recipe's text can be wrong, with the place and the words of its error."""

from __future__ import annotations

import pytest

from merge_kit.errors import MergeKitError, Problems, RecipeError
from merge_kit.recipe import parse_recipe, recipe_from_mapping

HEAD = "merge_method: linear\nmodels:\n- model: a\n  parameters: {weight: 1}\n"  # 4 lines
SLERP = "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\n"  # 3 lines
SLICES = "merge_method: passthrough\nslices:\n"  # 2 lines
RULES = "base_model: a\ntensors:\n"  # 2 lines


def error_of(text):
    with pytest.raises(MergeKitError) as caught:
        parse_recipe(text, source="r.yaml")
    return caught.value


YAML = [
    ("", "1:1", "the recipe is empty"),
    ("---\n---\n# nothing\n", "1:1", "the recipe is empty"),
    ("- 1\n", "1:1", "the document is a list of 1, expected a mapping"),
    ("hello", "1:1", "the document is 'hello', expected a mapping"),
    ("a:\n\tb: 1\n", "2:1", "spaces, not with tabs"),
    ("models: [1, 2\nname: x\n", "2:5", "not valid YAML"),
    ("name: *x\n", "1:7", "undefined alias"),
    ("name: a\x07b\n", "1:8", "control character U+0007"),
    (HEAD + "dtype: float16\ndtype: float32\n", "6:1", "the key 'dtype' stands twice, first in li"),
    (HEAD + "name: !!python/object:os.system x\n", "5:7", "the tag !!python/object:os.system is"),
    (HEAD + "name: !!python/object/apply:os.system [x]\n", "5:7", "!!python/object/apply:os.syst"),
    (HEAD + "name: !!binary aGk=\n", "5:7", "the tag !!binary is not allowed"),
    (HEAD + "name: !local x\n", "5:7", "the tag !local is not allowed"),
    (HEAD + "seed: !!int many\n", "5:7", "'many' is no int"),
    (HEAD + "seed: 0x_\n", "5:7", "'0x_' is no int"),
    (HEAD + "? [1]\n: 2\n", "5:3", "a key is a list or mapping"),
    (HEAD + "<<: 3\n", "5:5", "<< expects a mapping"),
    ("name: " + "[" * 200_000, "1:70", "nested more than 64 levels"),
    ("name: &x [*x]\n", "1:7", "an alias within itself"),
    ("name: &x {<<: *x}\n", "1:7", "an alias within itself"),
]
TOP = [
    (HEAD + "dtpye: float16\n", "5:1", "unknown key 'dtpye' in the document", "mean 'dtype'?"),
    ("models: [{model: a}]\n", "1:1", "merge_method is missing"),
    ("merge_method: linear\n", "1:1", "found no models, slices or modules"),
    ("merge_method: linear\nmodels: []\nslices: []\n", "1:1", "found no models, slices or modules"),
    (HEAD + "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n", "5:1", "models and slices"),
    (HEAD.replace("linear", "liner"), "1:15", "unknown merge method 'liner'", "mean 'linear'?"),
    (HEAD.replace("linear", "3"), "1:15", "merge_method is 3, expected text", "quotes"),
    (HEAD + "dtype: bf16\n", "5:8", "dtype is 'bf16', expected float16", "mean 'bfloat16'?"),
    (HEAD + "dtype: torch.fp16\n", "5:8", "dtype is 'torch.fp16'", "did you mean 'float16'?"),
    (HEAD + "out_dtype: int64\n", "5:12", "out_dtype is 'int64', expected float16"),
    (HEAD + "dtype: 16\n", "5:8", "dtype is 16, expected float16"),
    (HEAD + "chat_template: chatml\n", "5:1", "chat_template is not supported yet"),
    (HEAD + "card: {}\n", "5:1", "unknown key 'card'"),
    (HEAD + "seed: 1.5\n", "5:7", "seed is 1.5, expected a whole number"),
    (HEAD + "seed: true\n", "5:7", "seed is true, expected a whole number"),
    (HEAD + "seed: -1\n", "5:7", "seed is -1, expected a whole number from 0"),
    (HEAD + "seed: 99999999999999999999\n", "5:7", "expected a whole number from 0"),
    (HEAD + "seed: 0x" + "f" * 5000 + "\n", "5:7", "seed is '0xfff"),
    (HEAD + "shard_size: 5 parsecs\n", "5:13", "shard_size is '5 parsecs', expected a size"),
    (HEAD + "shard_size: 0\n", "5:13", "shard_size is 0, expected a size"),
    (HEAD + "shard_size: [1]\n", "5:13", "shard_size is a list of 1, expected a size"),
    (HEAD + "output: 3\n", "5:9", "output is 3, expected text"),
    (HEAD + "on_conflict: bass\n", "5:14", "expected error or base or first", "mean 'base'?"),
    (HEAD + "base_model: ''\n", "5:13", "base_model is '', expected text"),
    (HEAD + "parameters: 3\n", "5:13", "parameters is 3, expected a mapping"),
    (HEAD + "tokenizer: base\n", "5:12", "expected a mapping", "tokenizer: {source: base}"),
    (HEAD + "tokenizer: {tokens: {x: {}}}\n", "5:13", "tokenizer.tokens is not supported yet"),
    (HEAD + "tokenizer: {pad_to_multiple_of: 8}\n", "5:13", "pad_to_multiple_of is not supported"),
    (
        HEAD + "tokenizer_source: base\ntokenizer: {}\n",
        "6:1",
        "both tokenizer and tokenizer_source",
    ),
    (
        HEAD + "tokenizer: {}\ntokenizer_source: base\n",
        "6:1",
        "both tokenizer and tokenizer_source",
    ),
]
MODELS = [
    ("merge_method: linear\nmodels: {a: 1}\n", "2:9", "models is a mapping, expected a list"),
    ("merge_method: linear\nmodels: [a]\n", "2:10", "models.0 is 'a', expected a mapping"),
    ("merge_method: linear\nmodels: [{modle: a}]\n", "2:10", "model is missing in models.0"),
    ("merge_method: linear\nmodels: [{model: }]\n", "2:18", "model is missing in models.0"),
    (HEAD + "- {model: b, weight: 1}\n", "5:14", "unknown key 'weight'", "parameters: {weight"),
    (HEAD + "- {model: b, layer_range: [0, 1]}\n", "5:14", "unknown key 'layer_range'", "slices"),
    (HEAD + "- {model: a}\n", "5:11", "'a' stands twice in models, first in line 3"),
    (HEAD + "- {model: {path: b}}\n", "5:11", "model is missing", ""),
    (HEAD + "- {model: no}\n", "5:11", "model is false, expected text", "quotes"),
    (HEAD + "- {model: a@b@c}\n", "5:11", "'a@b@c' has two revisions", "{path: NAME}"),
    (HEAD + "- {model: a+}\n", "5:11", "'' is no reference"),
    (HEAD + "- {model: +a}\n", "5:11", "'' is no reference"),
    (HEAD + "- {model: a@+b}\n", "5:11", "'a@' is no reference"),
    (HEAD + "- {model: a+b@c@d}\n", "5:11", "'b@c@d' has two revisions"),
    (HEAD + f"- {{model: {'+'.join('a' * 40)}}}\n", "5:11", "a reference of 40 parts"),
    (HEAD + "- {model: {model: {path: b, rev: c}}}\n", "5:29", "unknown key 'rev'", "revision"),
    (HEAD + "- {model: {model: b, lora: [c, 3]}}\n", "5:32", "lora.1 is 3, expected text"),
]
SHAPES = [
    (SLICES + "- {source: []}\n", "3:3", "sources is missing in slices.0"),
    (SLICES + "- {sources: []}\n", "3:13", "sources is an empty list, expected at least one"),
    (SLICES + "- {sources: [{model: a}]}\n", "3:14", "layer_range is missing in sources.0"),
    *(
        (SLICES + f"- sources: [{{model: a, layer_range: {text}}}]\n", place, problem)
        for text, place, problem in (
            ("'0,2'", "3:37", "layer_range is '0,2', expected two whole numbers"),
            ("0-2", "3:37", "layer_range is '0-2', expected two whole numbers"),
            ("[0, 1, 2]", "3:37", "layer_range is a list of 3, expected two whole numbers"),
            ("[0, 1.5]", "3:41", "layer_range.1 is 1.5, expected a whole number from 0"),
            ("[0, true]", "3:41", "layer_range.1 is true, expected a whole number from 0"),
            ("[-2, -2]", "3:38", "layer_range.0 is -2, expected a whole number from 0"),
            ("[4, 2]", "3:37", "layer_range is [4, 2], expected the smaller number first"),
            ("[0, [1]]", "3:41", "layer_range.1 is a list of 1, expected a whole number"),
        )
    ),
    (
        SLICES + "- sources:\n  - {model: a, layer_range: [0, 2]}\n"
        "  - {model: b, layer_range: [0, 3]}\n",
        "5:5",
        "a source has 3 layers, the first of its slice 2",
    ),
    (
        SLICES + "- sources:\n  - {model: a, layer_range: [0, 2]}\n"
        "  - {model: a, layer_range: [2, 4]}\n",
        "5:13",
        "'a' stands twice in one slice, first in line 4",
    ),
    ("merge_method: linear\nmodules: {x: {}}\n", "2:14", "x has neither, expected either models"),
    ("merge_method: linear\nmodules: {x: 3}\n", "2:14", "x is 3, expected a mapping"),
    ("merge_method: linear\nmodules: [1]\n", "2:10", "modules is a list of 1, expected a mapping"),
    (
        (
            "merge_method: linear\nmodules:\n  x:\n    models: [{model: a}]\n"
            "    slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n"
        ),
        "5:5",
        "x has models and slices, expected either models or slices",
    ),
]
PARAMETERS = [
    (HEAD + "parameters: {normalize: maybe}\n", "5:25", "normalize is 'maybe', expected true or f"),
    (HEAD + "parameters: {normalize: 0.5}\n", "5:25", "normalize is 0.5, expected true or false"),
    (HEAD + "parameters: {normalize: 2}\n", "5:25", "normalize is 2, expected true or false"),
    (HEAD + "parameters: {weight: }\n", "5:22", "weight is empty, expected a finite number"),
    (HEAD + "parameters: {weight: .nan}\n", "5:22", "weight is nan, expected a finite number"),
    (HEAD + "parameters: {weight: -.inf}\n", "5:22", "weight is -inf, expected a finite number"),
    (HEAD + "parameters: {weight: nan}\n", "5:22", "weight is 'nan', expected a finite number"),
    (HEAD + "parameters: {weight: 1e999}\n", "5:22", "weight is '1e999', expected a finite numb"),
    (HEAD + "parameters: {density: .inf}\n", "5:23", "density is inf, expected a number, true"),
    (HEAD + "parameters: {weight: 50%}\n", "5:22", "weight is '50%'", "between 0 and 1"),
    (HEAD + "parameters: {weight: [1, x]}\n", "5:26", "weight.1 is 'x', expected a finite numb"),
    (HEAD + "parameters: {weight: [[1], 2]}\n", "5:23", "weight.0 is a list of 1, expected a fi"),
    (HEAD + "parameters: {weight: [1, {value: 2}]}\n", "5:26", "weight.1 is a mapping, expected"),
    (HEAD + "parameters: {weight: [{value: 2}, 1]}\n", "5:35", "weight.1 is 1, expected {filter,"),
    (HEAD + "parameters: {weight: [{value: []}]}\n", "5:31", "value is an empty list, expected "),
    (HEAD + "parameters: {weight: [{filter: a}]}\n", "5:23", "value is missing in weight.0"),
    (HEAD + "parameters: {weight: {value: {value: 1}}}\n", "5:30", "value is a mapping, expected"),
    (HEAD + "parameters: {weight: {value: 1, filter: 3}}\n", "5:41", "filter is 3, expected part"),
    (HEAD + "parameters: {weight: {value: 1, fliter: a}}\n", "5:33", "unknown key 'fliter'"),
    (HEAD + "parameters: {wieght: 1}\n", "5:14", "linear has no parameter 'wieght'", "'weight'?"),
    (HEAD + "parameters: {zzzzz: 1}\n", "5:14", "linear has no parameter 'zzzzz'", "normalize,"),
    (SLERP + "parameters: {t: x}\n", "4:17", "t is 'x', expected a finite number"),
    (SLERP + "parameters: {flatten: maybe}\n", "4:23", "flatten is 'maybe', expected true or f"),
]
TENSORS = [
    ("tensors: [{match: x, copy: a}]\n", "1:1", "tensors needs a base_model"),
    (RULES + "- {copy: a}\n", "3:3", "match is missing in tensors.0"),
    (RULES + "- {match: 3, copy: a}\n", "3:11", "match is 3, expected text"),
    (RULES + "- {match: x, mach: y, copy: a}\n", "3:14", "unknown key 'mach'", "mean 'match'?"),
    (RULES + "- {match: x, drop: false}\n", "3:20", "drop is false, expected true"),
    (RULES + "- {match: x, copy: a, drop: true}\n", "3:23", "tensors.0 has copy and drop, which"),
    (RULES + "- {match: x, copy: a, models: [{model: b}]}\n", "3:23", "tensors.0 has copy and mod"),
    (RULES + "- {match: x, drop: true, merge_method: linear}\n", "3:26", "drop and merge_method"),
    (RULES + "- {match: x, merge_method: liner, models: [{model: a}]}\n", "3:28", "'liner'"),
    (RULES + "- {match: x}\n", "3:3", "the rule for 'x' has nothing to merge"),
    (RULES + "- {match: x, models: [{model: a, parameters: {weight: z}}]}\n", "3:55", "weight is "),
]
CASES = [*YAML, *TOP, *MODELS, *SHAPES, *PARAMETERS, *TENSORS]


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{c[2][:30]}" for i, c in enumerate(CASES)])
def test_each_error_names_its_place_and_what_was_found(case):
    text, place, problem, *hint = case
    error = error_of(text)
    first = [e for e in getattr(error, "errors", [error]) if problem in str(e)]
    assert first, str(error)
    assert first[0].where == f"r.yaml:{place}"
    assert isinstance(first[0], RecipeError)
    assert error.code() == 2
    assert all(word in first[0].hint for word in hint)


def test_all_problems_come_in_one_list_in_the_order_of_the_text():
    error = error_of("merge_method: liner\nmodels:\n- {modl: a}\n- {model: b+}\ndtype: bf16\n")
    assert isinstance(error, Problems)
    places = [e.where.removeprefix("r.yaml:") for e in error.errors]
    assert places == ["1:15", "3:3", "3:4", "4:11", "5:8"]


def test_alias_bomb_is_refused_by_the_count_of_what_it_expands_to():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "expand to more than 200,000 values" in str(error_of("\n".join(lines)))


def test_merge_key_bomb_is_refused():
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 9)]
    assert "expand to more than 200,000 values" in str(error_of("\n".join(lines)))


def test_more_than_one_megabyte_is_refused():
    assert "larger than 1 MB" in str(error_of("# " + "x" * 1_000_000))


def test_reading_stops_after_a_hundred_problems():
    error = error_of(HEAD + "".join(f"x{i}: 1\n" for i in range(5000)))
    assert isinstance(error, Problems)
    assert len(error.errors) == 100


def test_the_dialects_parameters_do_not_need_a_method_that_reads_them():
    recipe = parse_recipe(HEAD + "parameters: {density: 0.5, int8_mask: true}\n", source="r.yaml")
    density, mask = recipe.notes
    assert density == "r.yaml:5:14: density has no effect with linear"
    assert mask.startswith("r.yaml:5:28: int8_mask has no effect (it changes how masks are stored")


def test_a_mapping_names_key_paths():
    mapping = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": "x"}}]}
    with pytest.raises(RecipeError) as caught:
        recipe_from_mapping(mapping)
    assert caught.value.where == "<recipe>:models.0.parameters.weight"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (object(), "of type object"),
        ({1: 2}, "of type dict"),
        (2**64, "64 bits"),
        (b"x", "of type bytes"),
    ],
)
def test_a_mapping_of_other_things_is_refused_at_its_key(value, problem):
    with pytest.raises(RecipeError, match=problem) as caught:
        recipe_from_mapping({"merge_method": "linear", "name": value})
    assert caught.value.where == "<recipe>:name"


def test_a_mapping_within_itself_is_refused():
    mapping = {"merge_method": "linear"}
    mapping["parameters"] = mapping
    with pytest.raises(RecipeError, match="nested more than 64"):
        recipe_from_mapping(mapping)
