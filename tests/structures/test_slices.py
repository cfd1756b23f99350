"""Slices: layers by list, a method of one slice, scales, several stacks, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml

from merge_kit.errors import MergeKitError, MismatchError, PlanError, RecipeError
from merge_kit.plan.describe_steps import layer_lines
from merge_kit.recipe import parse_recipe, recipe_schema
from tests.toys import config, family, layers, merge, outside, plan, toy, value, write

HEAD = "merge_method: passthrough\nslices:\n"


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = family(tmp_path_factory.mktemp("toys"))
    toy(folder / "DEEP", by_layer=10.0, layers=8)  # 10, 20, ... 80
    return folder


def read(text: str, folder: Path, name: str = "config.json") -> dict:
    """Return the config that a plan writes."""
    files = {f.name: f.text for f in plan(text, folder).side_files}
    return json.loads(files[name])


def repeated(text: str, folder: Path) -> list[str]:
    return [note for note in plan(text, folder).notes if "more than once" in note]


# Layers by list.


def test_layers_are_taken_in_the_order_of_the_list(toys):
    text = HEAD + "  - sources: [{model: IDX, layers: [4, 0, 2]}]\n"
    assert layers(merge(text, toys)) == [5, 1, 3]
    assert read(text, toys)["num_hidden_layers"] == 3


def test_a_list_and_a_range_of_one_length_are_merged_pairwise(toys):
    text = """
merge_method: linear
parameters: {weight: 1, normalize: false}
slices:
  - sources:
      - {model: IDX, layers: [4, 0, 2]}
      - {model: IDK, layer_range: [1, 4]}
"""
    assert layers(merge(text, toys)) == [5 + 2000, 1 + 3000, 3 + 4000]


def test_a_gradient_spans_the_layers_of_a_list(toys):
    text = HEAD + "  - sources: [{model: ONE, layers: [4, 2, 0], parameters: {scale: [1, 3]}}]\n"
    assert layers(merge(text, toys)) == [1, 2, 3]


@pytest.mark.parametrize(
    ("source", "problem", "hint"),
    [
        ("layers: []", "layers is an empty list, expected a list of at least one layer", "[0, 3"),
        ("layers: 3", "layers is 3, expected a list of at least one layer", "[0, 3, 5]"),
        ("layers: [1, 2, 1]", "layer 1 stands twice in layers", "write a second slice"),
        ("layers: [1, -2]", "layers.1 is -2, expected a whole number from 0", ""),
        ("layers: [1, x]", "layers.1 is 'x', expected a whole number from 0", ""),
        ("layers: [1], layer_range: [0, 1]", "found both layer_range and layers", "keep the one"),
        ("layers: null", "layer_range is missing in sources.0", "or layers: a list"),
    ],
)
def test_lists_that_mean_nothing_are_refused_at_their_place(source, problem, hint):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(HEAD + f"  - sources: [{{model: a, {source}}}]\n")
    assert caught.value.where.startswith("<recipe>:3:")
    assert problem in caught.value.problem
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    "source", ["layers: []", "layers: [1, 1]", "layers: [1], layer_range: [0, 1]", "layers: null"]
)
def test_the_schema_refuses_them_too(source):
    check = jsonschema.Draft202012Validator(recipe_schema())
    text = HEAD + "  - sources: [{{model: a, {}}}]\n"
    assert check.is_valid(yaml.safe_load(text.format("layers: [1, 0], layer_range: null")))
    assert not check.is_valid(yaml.safe_load(text.format(source)))


def test_layers_beyond_a_model_are_refused_with_its_depth(toys):
    text = HEAD + "  - sources: [{model: IDX, layers: [0, 5]}]\n"
    with pytest.raises(PlanError, match=r"layer 5 is beyond .*IDX, which has 5 layers"):
        plan(text, toys)
    text = HEAD + "  - sources: [{model: IDX, layer_range: [0, 6]}]\n"
    with pytest.raises(PlanError, match=r"layer_range \[0, 6\] is beyond .*which has 5 layers"):
        plan(text, toys)


def test_sources_of_different_length_are_refused():
    text = HEAD + (
        "  - sources: [{model: a, layers: [0, 3]}, {model: b, layer_range: [0, 3]}]\n"
        "    merge_method: linear\n"
    )
    with pytest.raises(RecipeError, match="a source has 3 layers, the first of its slice 2"):
        parse_recipe(text)


# A method of one slice.

SUMMED = """
merge_method: passthrough
slices:
  - sources: [{model: IDX, layer_range: [0, 2]}]
  - merge_method: linear
    sources:
      - {model: IDX, layer_range: [2, 4], parameters: {weight: 1}}
      - {model: DEEP, layers: [7, 0], parameters: {weight: 2}}
    parameters: {normalize: false}
  - sources: [{model: DEEP, layer_range: [6, 8]}]
"""


def test_some_layers_are_summed_and_others_stacked_out_of_models_of_different_depth(toys):
    made = merge(SUMMED, toys)
    assert layers(made) == [1, 2, 3 + 2 * 80, 4 + 2 * 10, 70, 80]
    assert outside(made)[0] == 100  # before the layers: the first slice
    assert read(SUMMED, toys)["num_hidden_layers"] == 6
    counts = plan(SUMMED, toys).counts()
    assert counts[:2] == (2 * 3, 4 * 3 + 3)  # merged; copied


def test_the_map_names_the_method_of_a_merged_slice(toys):
    assert layer_lines(plan(SUMMED, toys)) == [
        "model.layers 0-1 from input-1:IDX 0-1",
        "model.layers 2 from linear of input-1:IDX 2, input-2:DEEP 7",
        "model.layers 3 from linear of input-1:IDX 3, input-2:DEEP 0",
        "model.layers 4-5 from input-2:DEEP 6-7",
    ]


def test_what_stands_outside_the_layers_follows_the_method_of_its_slice(toys):
    text = """
merge_method: passthrough
slices:
  - sources: [{model: IDX, layer_range: [0, 1]}]
  - merge_method: linear
    sources:
      - {model: IDX, layer_range: [1, 2]}
      - {model: IDK, layer_range: [1, 2]}
    parameters: {weight: 1, normalize: false}
"""
    assert outside(merge(text, toys)) == [100, 200 + 2e5, 300 + 3e5]


def test_parameters_of_the_recipe_reach_every_slice_that_reads_them(toys):
    text = """
merge_method: passthrough
parameters: {weight: 2, normalize: false, scale: 10}
slices:
  - sources: [{model: ONE, layer_range: [0, 1]}]
  - merge_method: linear
    sources: [{model: ONE, layer_range: [1, 2]}]
"""
    assert layers(merge(text, toys)) == [10, 2]
    assert not [note for note in plan(text, toys).notes if "no effect" in note]


def test_a_parameter_that_only_another_slice_reads_is_said_to_do_nothing(toys):
    text = """
merge_method: passthrough
slices:
  - sources: [{model: ONE, layer_range: [0, 1]}]
    parameters: {weight: 2}
  - merge_method: linear
    sources: [{model: ONE, layer_range: [1, 2]}]
    parameters: {weight: 2, scale: 3}
"""
    notes = parse_recipe(text).notes
    assert any("weight has no effect with passthrough" in note for note in notes)
    assert any("scale has no effect with linear" in note for note in notes)


def test_a_slice_by_a_method_with_a_base_uses_its_own_base(toys):
    text = """
merge_method: passthrough
slices:
  - sources: [{model: ONE, layer_range: [0, 1]}]
  - merge_method: task_arithmetic
    base_model: ONE
    sources:
      - {model: ONE, layer_range: [1, 2]}
      - {model: K, layer_range: [1, 2], parameters: {weight: 0.5}}
"""
    assert layers(merge(text, toys)) == [1, 1 + 0.5 * 999]


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ("sparse_upcycle", "makes a whole model, and cannot merge the layers of a slice"),
        ("lora_linear", "makes an adapter, and cannot merge the layers of a slice"),
        ("liner", "unknown merge method 'liner'"),
    ],
)
def test_methods_that_merge_no_layers_are_refused_where_they_stand(method, problem):
    text = HEAD + f"  - merge_method: {method}\n    sources: [{{model: a, layer_range: [0, 1]}}]\n"
    with pytest.raises(RecipeError, match=problem) as caught:
        parse_recipe(text)
    assert caught.value.where == "<recipe>:3:19"


def test_a_slice_with_too_many_models_is_refused_at_the_slice(toys):
    text = HEAD.replace("passthrough", "linear") + (
        "  - merge_method: passthrough\n"
        "    sources: [{model: ONE, layers: [0]}, {model: K, layers: [0]}]\n"
    )
    with pytest.raises(MergeKitError, match="passthrough takes 1 model, found 2") as caught:
        plan(text, toys)
    assert "<recipe>:3:5" in str(caught.value)


# Scales.

SCALED = """
merge_method: passthrough
slices:
  - sources: [{model: IDX, layer_range: [0, 2]}]
  - sources: [{model: IDX, layer_range: [0, 2]}]
    parameters: {scale: [{filter: q_proj, value: 0.5}, {filter: up_proj, value: [2, 3]}]}
  - sources:
      - model: IDX
        layers: [4]
        parameters: {scale: [{filter: q_proj, value: 0.25}]}
"""


def test_kinds_of_tensors_are_scaled_and_the_others_copied(toys):
    made = merge(SCALED, toys)
    assert layers(made, "self_attn.q_proj.weight") == [1, 2, 0.5, 1, 1.25]
    assert layers(made, "mlp.up_proj.weight") == [1, 2, 2, 6, 5]
    assert layers(made, "input_layernorm.weight") == [1, 2, 1, 2, 5]
    steps = {s.outputs[0].key: s.action for s in plan(SCALED, toys).steps}
    scaled = [key for key, action in steps.items() if action == "merge"]
    assert sorted(scaled) == [
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.3.mlp.up_proj.weight",
        "model.layers.3.self_attn.q_proj.weight",
        "model.layers.4.self_attn.q_proj.weight",
    ]


def test_what_no_filter_matches_is_the_source_byte_for_byte(tmp_path):
    bits = torch.tensor([0x7FC1, 0x8000, 0x0001, 0xFF80], dtype=torch.uint16)  # NaN, -0, tiny, -inf
    odd = bits.view(torch.bfloat16)
    tensors = {
        f"model.layers.{i}.{s}.weight": odd.clone() for i in range(2) for s in ("norm", "o_proj")
    }
    tensors["model.layers.0.o_proj.weight"] = torch.ones(4, dtype=torch.bfloat16)
    write(tmp_path / "odd", tensors, config(2))
    text = HEAD + "  - sources: [{model: odd, layers: [0], "
    made = merge(text + "parameters: {scale: [{filter: o_proj, value: 0.7}]}}]\n", tmp_path)
    assert torch.equal(made["model.layers.0.norm.weight"].view(torch.uint16), bits)
    assert value(made["model.layers.0.o_proj.weight"]) == float(torch.tensor(0.7).bfloat16())


def test_the_map_notes_what_is_scaled(toys):
    assert layer_lines(plan(SCALED, toys)) == [
        "model.layers 0-1 from input-1:IDX 0-1",
        "model.layers 2-3 from input-1:IDX 0-1, up_proj x 2 to 3, q_proj x 0.5",
        "model.layers 4 from input-1:IDX 4, q_proj x 0.25",
    ]
    text = HEAD + "  - sources: [{model: IDX, layer_range: [0, 2], parameters: {scale: 0.5}}]\n"
    assert layer_lines(plan(text, toys)) == ["model.layers 0-1 from input-1:IDX 0-1, all x 0.5"]


def test_a_factor_of_an_earlier_stage_is_not_noted_again(toys):
    text = """
name: half
merge_method: passthrough
models: [{model: IDX, parameters: {scale: 0.5}}]
---
merge_method: passthrough
slices:
  - sources: [{model: half, layer_range: [0, 2]}]
  - sources: [{model: half, layer_range: [0, 2]}]
"""
    assert layer_lines(plan(text, toys)) == [
        "half: passthrough of input-1:IDX, each layer from the layers of the same number",
        "model.layers 0-1 from half 0-1",
        "model.layers 2-3 from half 0-1",
    ]
    assert layers(merge(text, toys)) == [0.5, 1, 0.5, 1]


# Repeats, and none.


def test_layers_that_stand_more_than_once_are_said_in_one_note(toys):
    text = HEAD + "".join(
        f"  - sources: [{{model: {model}, layer_range: {span}}}]\n"
        for model, span in (("IDX", "[0, 4]"), ("DEEP", "[2, 4]"), ("IDX", "[1, 5]"))
    )
    text += "  - sources: [{model: IDX, layers: [3, 1]}]\n"
    assert layers(merge(text, toys)) == [1, 2, 3, 4, 30, 40, 2, 3, 4, 5, 4, 2]
    (note,) = repeated(text, toys)
    assert note == (
        "model.layers: layers that stand there more than once: 1 of input-1:IDX (3 times), "
        "2 of input-1:IDX (twice), 3 of input-1:IDX (3 times)"
    )
    (note,) = repeated(SUMMED, toys)  # once summed, once stacked
    assert note.endswith(": 7 of input-2:DEEP (twice)")


def test_repeats_of_an_earlier_stage_are_said_with_its_name(toys):
    text = """
name: tall
merge_method: passthrough
slices:
  - sources: [{model: ONE, layer_range: [0, 3]}]
  - sources: [{model: ONE, layer_range: [2, 5]}]
---
merge_method: linear
models: [{model: tall, parameters: {weight: 1}}]
"""
    (note,) = repeated(text, toys)
    assert note.startswith("model.layers of tall: ")
    assert note.endswith(": 2 of input-1:ONE (twice)")


def test_an_output_without_layers_is_refused(toys):
    text = HEAD + "  - sources: [{model: ONE, layer_range: [5, 5]}]\n"
    with pytest.raises(PlanError, match=r"the slices take no layer of model\.layers"):
        plan(text, toys)


def test_a_slice_of_no_layers_still_gives_the_head(toys):
    text = HEAD + (
        "  - sources: [{model: ONE, layer_range: [0, 1]}]\n"
        "  - sources: [{model: K, layer_range: [5, 5]}]\n"
    )
    made = merge(text, toys)
    assert layers(made) == [1]
    assert outside(made) == [1, 1000, 1000]


# Layers of different shapes.


def sized(folder: Path, hidden: int, wide: int, *, layers: int = 2, **more) -> Path:
    """Write a model of these sizes; `wide` may be a list with one entry a layer."""
    vocabulary = more.pop("vocabulary", 3)
    tensors = {
        "model.embed_tokens.weight": torch.zeros(vocabulary, hidden),
        "model.norm.weight": torch.zeros(hidden),
    }
    for i in range(layers):
        width = wide[i] if isinstance(wide, list) else wide
        tensors[f"model.layers.{i}.up.weight"] = torch.zeros(width, hidden)
        tensors[f"model.layers.{i}.norm.weight"] = torch.zeros(hidden)
        if i in more.get("biased", ()):
            tensors[f"model.layers.{i}.up.bias"] = torch.zeros(width)
    more = {key: value for key, value in more.items() if key != "biased"}
    sizes = {"hidden_size": hidden, "intermediate_size": wide, "vocab_size": vocabulary}
    return write(folder, tensors, config(layers, **{**sizes, **more}))


def both(one: str = "x", other: str = "y") -> str:
    """Return a stack of two layers of one model and the last one of another."""
    return HEAD + (
        f"  - sources: [{{model: {one}, layer_range: [0, 2]}}]\n"
        f"  - sources: [{{model: {other}, layers: [1]}}]\n"
    )


@pytest.mark.parametrize(
    ("sizes", "found", "key"),
    [
        ((8, 8), "norm.weight of shape [8]", "hidden_size is 8 there, 4 here"),
        ((4, 16), "up.weight of shape [16, 4]", "intermediate_size is 16 there, 8 here"),
    ],
)
def test_layers_of_different_shapes_side_by_side_are_refused_by_name(tmp_path, sizes, found, key):
    sized(tmp_path / "x", 4, 8)
    sized(tmp_path / "y", *sizes)
    with pytest.raises(MismatchError) as caught:
        plan(both(), tmp_path)
    assert f"layer 1 of input-2:y has {found}" in caught.value.problem
    assert "layer 0 of input-1:x, whose config is taken" in caught.value.problem
    assert key in caught.value.problem
    assert "pad, crop or project" in caught.value.hint
    assert caught.value.where == "<recipe>:4:15"


def test_a_base_that_only_lends_its_config_must_fit_too(tmp_path):
    sized(tmp_path / "x", 4, 8)
    sized(tmp_path / "y", 4, 8)
    sized(tmp_path / "base", 8, 8)
    with pytest.raises(MergeKitError, match="hidden_size is 4 there, 8 here"):
        plan("base_model: base\n" + both(), tmp_path)


def test_a_head_of_another_vocabulary_is_refused(tmp_path):
    sized(tmp_path / "x", 4, 8)
    sized(tmp_path / "y", 4, 8)
    sized(tmp_path / "base", 4, 8, vocabulary=5)
    with pytest.raises(MismatchError) as caught:
        plan("base_model: base\n" + both(), tmp_path)
    assert caught.value.problem.startswith(
        "model.embed_tokens.weight of input-1:x has shape [3, 4]"
    )
    assert "vocab_size differs" in caught.value.problem
    assert caught.value.where == "<recipe>:4:5"


def test_sizes_that_a_config_gives_layer_by_layer_may_differ(tmp_path):
    sized(tmp_path / "x", 4, [8, 16])
    sized(tmp_path / "y", 4, [6, 12])
    assert read(both(), tmp_path)["intermediate_size"] == [8, 16, 12]
    sized(tmp_path / "z", 5, [8, 16])
    with pytest.raises(MismatchError, match="hidden_size is 5 there, 4 here"):
        plan(both("x", "z"), tmp_path)


def test_kinds_of_layers_that_one_model_has_may_stand_side_by_side(tmp_path):
    sized(tmp_path / "x", 4, 8, biased=[1])
    sized(tmp_path / "y", 4, 8, biased=[0])
    assert plan(both(), tmp_path).layers == 3


def test_layers_with_biases_beside_layers_without_are_refused(tmp_path):
    sized(tmp_path / "x", 4, 8)
    sized(tmp_path / "y", 4, 8, biased=[0, 1])
    with pytest.raises(MismatchError, match=r"layer 1 of input-2:y has up\.bias, which no layer"):
        plan(both(), tmp_path)
    with pytest.raises(MismatchError, match=r"lacks up\.bias, which the layers of input-1:y"):
        plan(both("y", "x"), tmp_path)


def test_layers_of_other_tensors_are_refused_between_architectures(tmp_path):
    toy(tmp_path / "x", layers=2)
    sized(tmp_path / "y", 4, 8, model_type="other")
    with pytest.raises(
        MismatchError, match=r"layer 1 of input-2:y has norm\.weight, up\.weight, which no layer"
    ):
        plan(both(), tmp_path)


def test_experts_beside_dense_layers_of_one_architecture_are_kept(tmp_path):
    for name, sparse in (("x", [1]), ("y", [0, 1])):
        tensors = {"model.embed_tokens.weight": torch.zeros(3, 4)}
        for i in range(2):
            part = "mlp.experts.0.up" if i in sparse else "mlp.up"
            tensors[f"model.layers.{i}.{part}.weight"] = torch.zeros(8, 4)
        dense = [i for i in range(2) if i not in sparse]
        settings = config(2, mlp_only_layers=dense, decoder_sparse_step=1, num_experts=1)
        write(tmp_path / name, tensors, settings | {"model_type": "qwen2_moe"})
    assert read(both(), tmp_path)["mlp_only_layers"] == [0]
    swapped = HEAD + (
        "  - sources: [{model: y, layers: [1]}]\n  - sources: [{model: x, layer_range: [0, 2]}]\n"
    )
    assert read(swapped, tmp_path)["mlp_only_layers"] == [1]


def test_layers_with_other_heads_are_refused_although_their_shapes_agree(tmp_path):
    sized(tmp_path / "x", 4, 8, num_attention_heads=2)
    sized(tmp_path / "y", 4, 8, num_attention_heads=4)
    with pytest.raises(MismatchError) as caught:
        plan(both(), tmp_path)
    assert caught.value.problem == (
        "layer 1 of input-2:y has num_attention_heads 4, input-1:x, whose config is taken, "
        "num_attention_heads 2"
    )


def test_settings_that_the_output_does_not_keep_are_said_once(tmp_path):
    sized(tmp_path / "x", 4, 8, rope_theta=1e4, hidden_act="silu", rms_norm_eps=1e-5)
    sized(tmp_path / "y", 4, 8, rope_theta=5e5, hidden_act="silu", rms_norm_eps=1e-6)
    text = both() + "  - sources: [{model: y, layer_range: [0, 2]}]\n"
    notes = [note for note in plan(text, tmp_path).notes if "made for" in note]
    assert notes == [
        (
            "layers of input-2:y are made for rope_theta 500000.0, rms_norm_eps 1e-06; the "
            "output's config has rope_theta 10000.0, rms_norm_eps 1e-05"
        )
    ]


def test_a_long_list_of_scaled_kinds_is_cut(tmp_path):
    names = [f"model.layers.0.k{i}.weight" for i in range(7)]
    write(tmp_path / "x", {name: torch.ones(2) for name in names}, config(1))
    filters = ", ".join(f"{{filter: k{i}, value: 2}}" for i in range(6))
    text = HEAD + f"  - sources: [{{model: x, layers: [0], parameters: {{scale: [{filters}]}}}}]\n"
    assert layer_lines(plan(text, tmp_path)) == [
        "model.layers 0 from input-1:x 0, k0, k1, k2, k3 and 2 more x 2"
    ]


def test_a_long_list_of_repeats_is_cut(toys):
    pairs = "".join(
        f"  - sources: [{{model: DEEP, layers: [{i}]}}]\n" for i in (0, 1, 2, 3, 4, 5, 6, 7)
    )
    alternating = "".join(
        f"  - sources: [{{model: DEEP, layers: [{i}]}}]\n" * (1 + i % 2) for i in range(8)
    )
    (note,) = repeated(HEAD + pairs + alternating, toys)
    assert note.count("input-1:DEEP") == 6
    assert note.endswith(" and 2 more")
