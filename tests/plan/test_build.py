"""Plans: what becomes of every tensor, what is refused, and the bill."""

from __future__ import annotations

import json

import pytest
import torch

from merge_kit.errors import MergeKitError, MismatchError, PlanError, Problems
from merge_kit.plan.process import process_bytes
from tests.toys import config, family, layers, merge, outside, plan, toy, value, write


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    return family(tmp_path_factory.mktemp("toys"))


def recipe(method: str, *models: str, **more) -> str:
    listed = [
        {"model": m, "parameters": {"weight": 1}} if method != "slerp" else {"model": m}
        for m in models
    ]
    return json.dumps({"merge_method": method, "models": listed, **more})


def test_a_tensor_that_some_inputs_lack_is_an_error_that_names_it(tmp_path):
    toy(tmp_path / "a", layers=2)
    toy(tmp_path / "b", layers=2)
    extra = {"model.layers.0.new.weight": torch.ones(3), "model.layers.1.new.weight": torch.ones(3)}
    ones = {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(4) for i in range(2)}
    write(tmp_path / "c", {**ones, **extra}, config(2))
    with pytest.raises(Problems) as caught:
        plan(recipe("linear", "a", "c"), tmp_path)
    assert caught.value.code() == 3
    text = str(caught.value)
    assert "input-1:a: lacks 2 tensors that input-2:c has: model.layers.0.new.weight" in text
    assert "input-2:c: lacks 7 tensors that input-1:a has" in text


def test_an_unknown_tensor_is_merged_like_any_other(tmp_path):
    for name, number in (("a", 1.0), ("b", 3.0)):
        write(tmp_path / name, {"strange/name of.thing": torch.full((3,), number)}, None)
    result = merge(recipe("linear", "a", "b"), tmp_path)
    assert value(result["strange/name of.thing"]) == 2


def test_models_of_different_depth_are_told_about_slices(toys, tmp_path):
    toy(tmp_path / "deep", layers=7)
    with pytest.raises(MismatchError, match=r"has 7 layers in model\.layers, .* has 5") as caught:
        plan(recipe("linear", "ONE", str(tmp_path / "deep")), toys)
    assert "slices" in str(caught.value)


def test_shapes_that_differ_are_both_named_with_what_to_do(tmp_path):
    for name, rows in (("a", 10), ("b", 12)):
        write(tmp_path / name, {"model.embed_tokens.weight": torch.zeros(rows, 4)}, None)
    with pytest.raises(MismatchError, match=r"shape \[10, 4\], input-2:b \[12, 4\]") as caught:
        plan(recipe("linear", "a", "b"), tmp_path)
    assert caught.value.where == "model.embed_tokens.weight"
    assert "vocabularies" in caught.value.hint


def test_all_problems_come_in_one_list(tmp_path):
    one = {"x": torch.zeros(2), "y": torch.zeros(3), "z": torch.zeros(4)}
    write(tmp_path / "a", one, None)
    write(tmp_path / "b", {"x": torch.zeros(5), "y": torch.zeros(6)}, None)
    with pytest.raises(Problems) as caught:
        plan(recipe("linear", "a", "b"), tmp_path)
    assert len(caught.value.errors) == 3


def test_missing_models_come_in_one_list(tmp_path):
    with pytest.raises(Problems) as caught:
        plan(recipe("linear", "no/such", "nor/this"), tmp_path)
    assert len(caught.value.errors) == 2
    assert caught.value.code() == 3
    assert "hf download" in str(caught.value)


def tied(folder, number: float, *, layers_=2):
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(layers_)]
    tensors = {n: torch.full((4, 4), number) for n in [*names, "model.embed_tokens.weight"]}
    return write(folder, tensors, config(layers_, tie_word_embeddings=True))


def untied(folder, number: float, head: float, *, layers_=2):
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(layers_)]
    tensors = {n: torch.full((4, 4), number) for n in [*names, "model.embed_tokens.weight"]}
    tensors["lm_head.weight"] = torch.full((4, 4), head)
    return write(folder, tensors, config(layers_))


def config_of(made) -> dict:
    return json.loads(next(f.text for f in made.side_files if f.name == "config.json"))


def test_two_tied_models_stay_one_tensor(tmp_path):
    tied(tmp_path / "a", 1.0)
    tied(tmp_path / "b", 3.0)
    made = plan(recipe("linear", "a", "b"), tmp_path)
    assert "lm_head.weight" not in {t.key for s in made.steps for t in s.outputs}
    assert config_of(made)["tie_word_embeddings"] is True


@pytest.mark.parametrize("order", [("tied", "untied"), ("untied", "tied")])
def test_a_tied_and_an_untied_model_become_untied(tmp_path, order):
    tied(tmp_path / "tied", 3.0)
    untied(tmp_path / "untied", 1.0, 1.0)
    text = recipe("linear", *order, parameters={"normalize": False})
    result = merge(text, tmp_path)
    assert value(result["lm_head.weight"]) == 4
    assert config_of(plan(text, tmp_path))["tie_word_embeddings"] is False


def test_integers_are_copied_when_equal_and_refused_when_not(tmp_path):
    for name, last in (("a", 3), ("b", 3), ("c", 4)):
        tensors = {"w": torch.ones(2), "position_ids": torch.tensor([0, 1, 2, last])}
        write(tmp_path / name, tensors, None)
    result = merge(recipe("linear", "a", "b"), tmp_path)
    assert result["position_ids"].tolist() == [0, 1, 2, 3]
    with pytest.raises(MismatchError, match="input-1:a and input-2:c"):
        merge(recipe("linear", "a", "c"), tmp_path)
    first = merge(recipe("linear", "c", "a", on_conflict="first"), tmp_path)
    assert first["position_ids"].tolist() == [0, 1, 2, 4]
    base = merge(recipe("linear", "c", "a", on_conflict="base", base_model="a"), tmp_path)
    assert base["position_ids"].tolist() == [0, 1, 2, 3]


def test_fp8_is_refused_for_arithmetic_and_copied_by_passthrough(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, {"w": torch.ones(4).to(torch.float8_e4m3fn)}, None)
    with pytest.raises(MismatchError, match="without their scales"):
        plan(recipe("linear", "a", "b"), tmp_path)
    made = plan(json.dumps({"merge_method": "passthrough", "models": [{"model": "a"}]}), tmp_path)
    assert made.counts() == (0, 1, 0)


def test_every_dtype_passes_through(tmp_path):
    kinds = [
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex64,
        torch.float8_e5m2,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    ]
    tensors = {str(kind): torch.ones(5).to(kind) for kind in kinds}
    write(tmp_path / "a", tensors, None)
    result = merge('{"merge_method": "passthrough", "models": [{"model": "a"}]}', tmp_path)
    for name, tensor in tensors.items():
        assert result[name].dtype == tensor.dtype
        assert torch.equal(result[name].view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize(
    ("kinds", "named", "wanted"),
    [
        ((torch.bfloat16, torch.bfloat16), {}, "BF16"),
        ((torch.bfloat16, torch.float16), {}, "F32"),
        ((torch.bfloat16, torch.float64), {}, "F64"),
        ((torch.float32, torch.float32), {"dtype": "bfloat16"}, "BF16"),
        ((torch.bfloat16, torch.bfloat16), {"dtype": "float32", "out_dtype": "float16"}, "F16"),
    ],
)
def test_output_dtypes(tmp_path, kinds, named, wanted):
    for name, kind in zip("ab", kinds, strict=True):
        toy(tmp_path / name, layers=1, dtype=kind)
    made = plan(recipe("linear", "a", "b", **named), tmp_path)
    assert dict(made.dtypes) == {wanted: 6}
    assert made.steps[0].compute == ("F64" if torch.float64 in kinds else "F32")
    names = {"BF16": "bfloat16", "F32": "float32", "F64": "float64", "F16": "float16"}
    assert config_of(made)["torch_dtype"] == names[wanted]


def test_stages_feed_one_another_without_a_checkpoint(toys):
    text = """
name: mean
merge_method: linear
parameters: {weight: 1}
models: [{model: ONE}, {model: K}]
---
merge_method: task_arithmetic
base_model: ZERO
models: [{model: mean, parameters: {weight: 2}}]
"""
    result = merge(text, toys)
    assert set(layers(result) + outside(result)) == {1001}


def test_a_stage_stays_in_float32_and_rounds_where_it_names_a_dtype(tmp_path):
    for name, number in (("a", 1.0), ("b", 1.0 + 2.0**-7)):
        toy(tmp_path / name, number, layers=1, dtype=torch.bfloat16)
    inner = "name: m\nmerge_method: linear\nparameters: {weight: 1}\n"
    inner += "models: [{model: a}, {model: b}]\n"
    outer = "---\nmerge_method: linear\nparameters: {weight: 4, normalize: false}\n"
    outer += "models: [{model: m}]\n"
    exact, rounded = 4 * (1 + 2.0**-8), 4.0
    assert outside(merge(inner + outer + "dtype: float32\n", tmp_path))[0] == exact
    staged = merge(inner + "dtype: bfloat16\n" + outer + "dtype: float32\n", tmp_path)
    assert outside(staged)[0] == rounded


def test_three_models_by_slerp_in_stages(toys):
    text = """
name: first
merge_method: slerp
base_model: ONE
models: [{model: K}]
parameters: {t: 0.5}
---
merge_method: slerp
base_model: first
models: [{model: ZERO}]
parameters: {t: 0.3333333333333333}
"""
    result = merge(text, toys)
    assert value(result["lm_head.weight"]) == pytest.approx(500.5 * 2 / 3)
    assert plan(text, toys).bill.scratch_bytes > 0


def test_a_stack_of_a_merge_and_a_model(toys):
    text = """
name: mean
merge_method: linear
parameters: {weight: 1}
models: [{model: IDX}, {model: IDK}]
---
merge_method: passthrough
slices:
  - sources: [{model: IDX, layer_range: [0, 2]}]
  - sources: [{model: mean, layer_range: [1, 3]}]
"""
    assert layers(merge(text, toys)) == [1, 2, 1001, 1501.5]


def test_rules_change_what_they_match_and_nothing_else(toys):
    text = """
merge_method: linear
base_model: IDX
models: [{model: K, parameters: {weight: 1}}]
tensors:
  - {match: "*.layers.0.*", copy: K}
  - {match: "*.layers.1.*", drop: true}
  - {match: "*up_proj*", merge_method: linear, parameters: {weight: 2, normalize: false}}
"""
    result = merge(text, toys)
    assert value(result["model.layers.0.self_attn.q_proj.weight"]) == 1000
    assert not [name for name in result if ".layers.1." in name]
    up_proj = value(result["model.layers.2.mlp.up_proj.weight"])
    assert up_proj == 1000 + 2 * 3  # the base is added with the rule's weight
    assert value(result["model.layers.2.self_attn.q_proj.weight"]) == 3
    assert outside(result) == [100, 200, 300]
    made = plan(text, toys)
    assert made.counts()[:2] == (3, 18 - 3 - 3)
    dropped = {f.tensor for f in made.fates if f.what == "dropped" and f.model == "input-2"}
    assert "model.layers.1.mlp.up_proj.weight" in dropped


def test_a_rule_that_matches_nothing_is_an_error(toys):
    text = """
base_model: IDX
tensors: [{match: "*.ffn.*", copy: IDX}]
"""
    with pytest.raises(PlanError, match="no tensor is left for"):
        plan(text, toys)


def test_bounds_of_layer_range_are_checked(toys):
    text = """
merge_method: passthrough
slices: [{sources: [{model: ONE, layer_range: [3, 6]}]}]
"""
    with pytest.raises(PlanError, match=r"\[3, 6\] is beyond input-1:ONE, which has 5 layers"):
        plan(text, toys)


def test_a_method_that_needs_the_base_wants_it_in_each_slice(toys):
    text = """
merge_method: task_arithmetic
base_model: ZERO
parameters: {weight: 1}
slices: [{sources: [{model: ONE, layer_range: [0, 5]}]}]
"""
    with pytest.raises(PlanError, match="needs the base model among the sources"):
        plan(text, toys)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{merge_method: slerp, models: [{model: ONE}], parameters: {t: 1}}", "needs a base_model"),
        (
            "{merge_method: slerp, base_model: ONE, models: [K, ZERO], parameters: {t: 1}}",
            "takes 1 model beside the base, found 2",
        ),
        ("{merge_method: slerp, base_model: ONE, models: [{model: K}]}", "slerp needs 't'"),
        ("{merge_method: linear, models: [{model: K}]}", "linear needs 'weight' for input-1:K"),
        (
            "{merge_method: passthrough, models: [{model: K}, {model: ONE}]}",
            "takes 1 model, found 2",
        ),
        (
            "{merge_method: linear, models: [{model: K}, {model: ONE}], parameters: {weight: 0}}",
            "normalising would divide by it",
        ),
    ],
)
def test_what_a_method_demands_is_checked_once(toys, text, problem):
    text = text.replace("[K,", "[{model: K},").replace(" ONE]", " {model: ONE}]")
    text = text.replace(" ZERO]", " {model: ZERO}]")
    with pytest.raises(MergeKitError, match=problem) as caught:
        plan(text, toys)
    assert not isinstance(caught.value, Problems)
    assert caught.value.code() == 2


def test_the_base_is_a_task_of_its_own_never(toys):
    text = """
merge_method: task_arithmetic
base_model: ONE
parameters: {weight: 5}
models: [{model: ONE}, {model: K}]
"""
    assert set(layers(merge(text, toys))) == {1 + 5 * 999}


def test_modules_merge_stacks_by_name_and_copy_the_rest(tmp_path):
    for name, number in (("a", 1.0), ("b", 3.0)):
        tensors = {
            "encoder.embed.weight": torch.full((2,), number),
            "multi_modal_projector.weight": torch.full((2,), number),
        }
        for i in range(2):
            tensors[f"encoder.layers.{i}.w"] = torch.full((2,), number + i)
            tensors[f"decoder.layers.{i}.w"] = torch.full((2,), number + i)
        write(tmp_path / name, tensors, None)
    text = """
merge_method: linear
base_model: a
parameters: {weight: 1}
modules:
  encoder.layers: {models: [{model: a}, {model: b}]}
"""
    result = merge(text, tmp_path)
    assert value(result["encoder.layers.1.w"]) == 3
    assert value(result["decoder.layers.1.w"]) == 2
    assert value(result["multi_modal_projector.weight"]) == 1
    assert any("are copied from input-1:a" in note for note in plan(text, tmp_path).notes)


def test_components_in_folders_are_merged_each(tmp_path):
    for name, number in (("a", 1.0), ("b", 3.0)):
        for part in ("unet", "text_encoder"):
            write(tmp_path / name / part, {"conv.weight": torch.full((2,), number)}, {"x": 1})
        (tmp_path / name / "model_index.json").write_text("{}")
        (tmp_path / name / "scheduler").mkdir()
        (tmp_path / name / "scheduler/scheduler_config.json").write_text("{}")
    made = plan(recipe("linear", "a", "b"), tmp_path)
    names = {f.name for f in made.side_files}
    assert {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json"} <= names
    assert {s.name for s in made.shards} == {
        "unet/model.safetensors",
        "text_encoder/model.safetensors",
    }
    result = merge(recipe("linear", "a", "b"), tmp_path)
    assert value(result["unet/conv.weight"]) == value(result["text_encoder/conv.weight"]) == 2


def test_fates_account_for_every_tensor_of_every_input(toys):
    text = """
merge_method: passthrough
slices:
  - sources: [{model: ONE, layer_range: [0, 2]}]
  - sources: [{model: K, layer_range: [3, 5]}]
"""
    made = plan(text, toys)
    assert len(made.fates) == 2 * 18
    assert made.counts() == (0, 15, 36 - 15)
    why = {f.tensor: f.why for f in made.fates if f.model == "input-1" and f.what == "dropped"}
    assert why["model.layers.2.mlp.up_proj.weight"] == "in no slice"
    assert [(o.layer, o.sources) for o in made.layer_map] == [
        (0, (("input-1", 0),)),
        (1, (("input-1", 1),)),
        (2, (("input-2", 3),)),
        (3, (("input-2", 4),)),
    ]


def test_the_budget_shrinks_slabs_and_refuses_what_cannot_fit(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, {"w": torch.zeros(2**20)}, None)
    text = recipe("linear", "a", "b")
    free = plan(text, tmp_path)
    tight = plan(text, tmp_path, memory_bytes=process_bytes() + 3_000_000)
    assert tight.bill.peak_bytes <= process_bytes() + 3_000_000 < free.bill.peak_bytes
    assert tight.steps[0].slab_elements < free.steps[0].slab_elements
    with pytest.raises(PlanError, match="the budget is 1 MB"):
        plan(text, tmp_path, memory_bytes=1_000_000)


def test_the_identity_of_a_plan_follows_what_decides_the_bytes(toys):
    text = recipe("linear", "ONE", "K")
    one = plan(text, toys)
    assert one.identity == plan(text, toys, threads=1, slab_blocks=1).identity
    assert one.identity != plan(text.replace("1}", "2}", 1), toys).identity


def test_vocabularies_that_differ_are_noted_or_refused(tmp_path):
    for name, word in (("a", "x"), ("b", "y")):
        toy(tmp_path / name, layers=1)
        vocab = {"model": {"type": "BPE", "vocab": {word: 0}}, "added_tokens": []}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(vocab))
    notes = plan(recipe("linear", "a", "b"), tmp_path).notes
    assert any("vocabularies" in note for note in notes)
    with pytest.raises(MismatchError, match="vocabularies"):
        plan(recipe("linear", "a", "b", tokenizer_source="union"), tmp_path)
    made = plan(recipe("linear", "a", "b"), tmp_path)
    source = next(f.source for f in made.side_files if f.name == "tokenizer.json")
    assert source is not None
    assert source.parent.name == "a"
