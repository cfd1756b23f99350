"""Deeper models of toys whose layers hold one number each: what comes from where."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from merge_kit import api
from merge_kit.errors import MergeKitError
from merge_kit.plan.describe_steps import layer_lines
from tests import toys


@pytest.fixture
def folder(tmp_path):
    """Hold LOW, 4 layers of 1 to 4, and HIGH, 6 layers of 10 to 60."""
    toys.toy(tmp_path / "LOW", layers=4, by_layer=1.0, outside=(100.0, 200.0, 300.0))
    toys.toy(tmp_path / "HIGH", layers=6, by_layer=10.0, outside=(1e5, 2e5, 3e5))
    return tmp_path


def text(parameters: str, models: str = "LOW", more: str = "") -> str:
    listed = ", ".join(f"{{model: {name}}}" for name in models.split())
    models = f"models: [{listed}]\n" if listed else ""
    return f"merge_method: depth_upscale\n{models}parameters: {{{parameters}}}\n{more}"


def refused(recipe: str, folder) -> str:
    with pytest.raises(MergeKitError) as caught:
        toys.plan(recipe, folder)
    return str(caught.value)


def test_solar_takes_first_layers_then_last_layers(folder):
    made = toys.merge(text("target_layers: 6"), folder)
    assert toys.layers(made) == [1, 2, 3, 2, 3, 4]
    assert toys.outside(made) == [100, 200, 300]
    assert toys.layers(toys.merge(text("overlap: 1"), folder)) == [1, 2, 3, 2, 3, 4]


def test_an_overlap_of_none_puts_two_whole_copies_on_one_another(folder):
    assert toys.layers(toys.merge(text("overlap: 0"), folder)) == [1, 2, 3, 4, 1, 2, 3, 4]


def test_an_odd_target_takes_one_more_of_the_lower_copy_and_says_so(folder):
    plan = toys.plan(text("target_layers: 5"), folder)
    assert toys.layers(toys.merge(text("target_layers: 5"), folder)) == [1, 2, 3, 3, 4]
    said = "5 layers leave out 3, an odd number: of the lower copy 3 are taken, of the upper 2"
    assert said in plan.notes


def test_two_models_give_the_lower_part_and_the_upper(folder):
    made = toys.merge(text("overlap: 1", "LOW HIGH"), folder)
    assert toys.layers(made) == [1, 2, 3, 20, 30, 40, 50, 60]
    assert toys.outside(made) == [100, 2e5, 3e5]
    made = toys.merge(text("overlap: 1", "HIGH LOW"), folder)
    assert toys.layers(made) == [10, 20, 30, 40, 50, 2, 3, 4]
    assert toys.outside(made) == [1e5, 200, 300]


def test_the_mean_of_a_pair_is_the_default(folder):
    made = toys.merge(text("overlap: 2, overlap_mode: sum"), folder)
    assert toys.layers(made) == [1, 2, 2, 3, 3, 4]  # (3 + 1) / 2, (4 + 2) / 2
    made = toys.merge(text("overlap: 2, overlap_mode: sum", "LOW HIGH"), folder)
    assert toys.layers(made) == [1, 2, 6.5, 12, 30, 40, 50, 60]


def test_t_is_the_share_of_the_upper_copy(folder):
    sums = "target_layers: 6, overlap_mode: sum"
    assert toys.layers(toys.merge(text(f"{sums}, t: 0"), folder)) == [1, 2, 3, 4, 3, 4]
    assert toys.layers(toys.merge(text(f"{sums}, t: 1"), folder)) == [1, 2, 1, 2, 3, 4]
    assert toys.layers(toys.merge(text(f"{sums}, t: 0.25"), folder)) == [1, 2, 2.5, 3.5, 3, 4]


def test_identities_follow_on_the_layers_they_copy(folder):
    projections = {"self_attn.o_proj.weight": (4, 4), "mlp.down_proj.weight": (4, 4)}
    tensors = {f"model.layers.{i}.{s}": torch.full(shape, i + 1.0)
               for i in range(4) for s, shape in projections.items()}  # fmt: skip
    tensors |= {f"model.layers.{i}.{s}": torch.full((4,), i + 1.0)
                for i in range(4) for s in toys.SUFFIXES}  # fmt: skip
    toys.write(folder / "M", tensors, toys.config(4))
    made = toys.merge(text("target_layers: 6, block_expansion: true", "M"), folder)
    assert toys.layers(made) == [1, 2, 2, 3, 4, 4]
    for suffix in projections:
        assert toys.layers(made, suffix) == [1, 2, 0, 3, 4, 0]
    plan = toys.plan(text("target_layers: 6, block_expansion: true", "M"), folder)
    assert layer_lines(plan) == [
        "model.layers 0-1 from input-1:M 0-1",
        "model.layers 2 from identity of input-1:M 1",
        "model.layers 3-4 from input-1:M 2-3",
        "model.layers 5 from identity of input-1:M 3",
    ]
    assert {fate.what for fate in plan.fates} == {"copied"}
    assert "2 new layers change nothing until trained: 2, 5" in plan.notes


def test_a_base_alone_is_the_model(folder):
    made = toys.merge(text("target_layers: 6", "", "base_model: LOW\n"), folder)
    assert toys.layers(made) == [1, 2, 3, 2, 3, 4]


def test_a_base_beside_models_only_lends_its_config(folder):
    toys.toy(folder / "BASE", 7.0, layers=3, max_position_embeddings=99)
    recipe = text("overlap: 1", "LOW HIGH", "base_model: BASE\n")
    assert toys.layers(toys.merge(recipe, folder)) == [1, 2, 3, 20, 30, 40, 50, 60]
    plan = toys.plan(recipe, folder)
    (config,) = [f.text for f in plan.side_files if f.name == "config.json"]
    assert json.loads(config)["max_position_embeddings"] == 99
    assert json.loads(config)["num_hidden_layers"] == 8
    lent = {fate.what for fate in plan.fates if fate.model == base_key(plan)}
    assert lent == {"dropped"}


def base_key(plan) -> str:
    return next(model.key for model in plan.inputs if model.is_base)


def test_a_base_that_is_listed_too_is_one_of_the_models(folder):
    recipe = text("overlap: 2, overlap_mode: sum, blend: slerp, t: 1", "LOW HIGH")
    wanted = toys.merge(recipe, folder)
    for base in ("LOW", "HIGH"):
        made = toys.merge(f"{recipe}base_model: {base}\n", folder)
        assert toys.layers(made) == toys.layers(wanted)


def test_stages_are_models_below_and_above(folder):
    mean = "name: MEAN\nmerge_method: linear\nparameters: {weight: 1}\n"
    toys.toy(folder / "OTHER", layers=4, by_layer=3.0)
    mean += "models: [{model: LOW}, {model: OTHER}]\n---\n"
    made = toys.merge(mean + text("target_layers: 6", "MEAN"), folder)
    assert toys.layers(made) == [2, 4, 6, 4, 6, 8]
    deep = "name: DEEP\n" + text("overlap: 2, overlap_mode: sum") + "---\n"
    above = (
        "merge_method: linear\nmodels: [{model: DEEP}, {model: HIGH}]\nparameters: {weight: 1}\n"
    )
    made = toys.merge(deep + above, folder)
    assert toys.layers(made) == [5.5, 11, 16, 21.5, 26.5, 32]
    twice = deep + text("target_layers: 8", "DEEP")
    assert toys.layers(toys.merge(twice, folder)) == [1, 2, 2, 3, 2, 3, 3, 4]


def test_an_adapter_is_applied_before(folder):
    low = {f"model.layers.{i}.mlp.up_proj.weight": torch.full((4, 4), i + 1.0) for i in range(4)}
    toys.write(folder / "M", low, toys.config(4))
    (folder / "A").mkdir()
    lead = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {f"{lead}.lora_A.weight": torch.ones(1, 4), f"{lead}.lora_B.weight": torch.ones(4, 1)}
    save_file(factors, folder / "A" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 5, "target_modules": ["up_proj"]}
    (folder / "A" / "adapter_config.json").write_text(json.dumps(settings))
    suffix = "mlp.up_proj.weight"
    made = toys.merge(text("overlap: 0", "M+A"), folder)
    assert toys.layers(made, suffix) == [6, 2, 3, 4, 6, 2, 3, 4]
    made = toys.merge(text("overlap: 3, overlap_mode: sum", "M+A"), folder)
    assert toys.layers(made, suffix) == [6, 4, 2.5, 3.5, 4]
    plan = toys.plan(text("overlap: 1", "M M+A"), folder)
    left = {(f.model, f.tensor): f.why for f in plan.fates if f.what == "dropped"}
    assert len(left) == 2  # the first layer of the upper copy is left out, and so are its factors
    assert set(left.values()) == {"layer 0 is left out where the copies meet"}


def test_what_two_models_give_to_nothing_is_dropped_with_the_reason(folder):
    plan = toys.plan(text("overlap: 1", "LOW HIGH"), folder)
    left = {(f.model, f.tensor): f.why for f in plan.fates if f.what == "dropped"}
    low, high = "input-1", "input-2"
    assert left.pop((low, "lm_head.weight")) == "taken from input-2:HIGH, the other copy"
    assert left.pop((low, "model.norm.weight")) == "taken from input-2:HIGH, the other copy"
    assert left.pop((high, "model.embed_tokens.weight")) == "taken from input-1:LOW, the other copy"
    for suffix in toys.SUFFIXES:
        why = left.pop((low, f"model.layers.3.{suffix}"))
        assert why == "layer 3 is left out where the copies meet"
        why = left.pop((high, f"model.layers.0.{suffix}"))
        assert why == "layer 0 is left out where the copies meet"
    assert not left


@pytest.mark.parametrize("mode", ["drop", "sum"])
def test_nothing_of_one_model_is_dropped(folder, mode):
    plan = toys.plan(text(f"target_layers: 6, overlap_mode: {mode}"), folder)
    assert not [fate for fate in plan.fates if fate.what == "dropped"]


def test_the_map_says_what_is_summed(folder):
    plan = toys.plan(text("overlap: 2, overlap_mode: sum, blend: slerp", "LOW HIGH"), folder)
    assert layer_lines(plan) == [
        "model.layers 0-1 from input-1:LOW 0-1",
        "model.layers 2-3 from slerp of input-1:LOW 2-3, input-2:HIGH 0-1",
        "model.layers 4-7 from input-2:HIGH 2-5",
    ]
    assert plan.layers == 8


def test_bytes_are_copied_in_drop_mode_and_kept_in_their_dtype(folder):
    toys.toy(folder / "HALF", layers=4, by_layer=0.1, dtype=torch.bfloat16)
    plan = toys.plan(text("target_layers: 6", "HALF"), folder)
    assert {step.action for step in plan.steps} == {"copy"}
    assert dict(plan.dtypes).keys() == {"BF16"}
    plan = toys.plan(text("target_layers: 6, overlap_mode: sum", "HALF"), folder)
    assert dict(plan.dtypes).keys() == {"BF16"}
    plan = toys.plan(text("target_layers: 6", "HALF", "dtype: float32\n"), folder)
    assert dict(plan.dtypes).keys() == {"F32"}


def test_a_named_dtype_is_that_of_zeros_too(folder):
    names = [f"model.layers.{i}.mlp.{n}" for i in range(2) for n in ("up_proj", "down_proj")]
    tensors = {f"{name}.weight": torch.ones(4, 4, dtype=torch.bfloat16) for name in names}
    toys.write(folder / "M", tensors, toys.config(2))
    recipe = text("target_layers: 4, block_expansion: true", "M")
    for more, dtype in (("", torch.bfloat16), ("dtype: float16\n", torch.float16)):
        made = toys.merge(recipe + more, folder)
        assert {tensor.dtype for tensor in made.values()} == {dtype}
        assert toys.layers(made, "mlp.down_proj.weight") == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("parameters", "idle"),
    [
        ("target_layers: 6, t: 0.3, blend: slerp", ["t", "blend"]),
        ("overlap: 0, overlap_mode: sum, t: 0.3", ["t"]),
        ("overlap: 1, overlap_mode: sum, t: 0.3", []),
        ("overlap: 1, overlap_mode: drop", []),
    ],
)
def test_what_has_no_effect_is_said(folder, parameters, idle):
    plan = toys.plan(text(parameters), folder)
    said = [note for note in plan.notes if "has no effect" in note]
    assert sorted(note.split(": ")[1].split(" ")[0] for note in said) == sorted(idle)


def test_tied_models_keep_the_embedding_of_the_lower_one_as_their_head(folder):
    for name, value in (("T1", 1.0), ("T2", 2.0)):
        toys.toy(folder / name, value, layers=2, tie_word_embeddings=True)
    plan = toys.plan(text("overlap: 0", "T1 T2"), folder)
    assert any(
        "that of input-1:T1: the embedding of input-2:T2 is not used" in n for n in plan.notes
    )
    assert not any("tied" in note for note in toys.plan(text("overlap: 0", "T1"), folder).notes)


def test_pairs_of_two_kinds_are_of_the_kind_of_the_lower_one_and_the_plan_says_so(folder):
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    toys.toy(folder / "M", layers=4, layer_types=kinds, sliding_window=8)
    plan = toys.plan(text("overlap: 2, overlap_mode: sum", "M"), folder)
    (config,) = [json.loads(f.text) for f in plan.side_files if f.name == "config.json"]
    assert config["layer_types"] == [kinds[i] for i in (0, 1, 2, 3, 2, 3)]
    assert any("of the kind of the lower one" in note for note in plan.notes)
    plan = toys.plan(text("overlap: 1, overlap_mode: sum", "M"), folder)
    assert not any("of the kind of the lower one" in note for note in plan.notes)


def test_a_period_that_breaks_is_refused_by_its_name(folder):
    toys.toy(folder / "M", layers=4, sliding_window=8, sliding_window_pattern=2)
    said = refused(text("target_layers: 5", "M"), folder)
    assert "sliding_window_pattern cannot follow this order of layers" in said
    assert "layer_types" in said
    assert toys.plan(text("overlap: 1", "M"), folder).layers == 6  # it goes on from 2 to 1


def test_pairs_of_layers_that_hold_other_tensors_are_refused(folder):
    tensors = {f"model.layers.{i}.a.weight": torch.ones(4) for i in range(4)}
    more = {"model.layers.0.b.weight": torch.ones(2), "model.layers.3.b.weight": torch.ones(3)}
    toys.write(folder / "M", {**tensors, **more}, toys.config(4))
    said = refused(text("overlap: 2, overlap_mode: sum", "M"), folder)
    assert "layer 2 of input-1:M and layer 0 of input-1:M would be summed" in said
    assert "only one of them has b.weight" in said
    said = refused(text("overlap: 1, overlap_mode: sum", "M"), folder)
    assert "b.weight has shape [3] in one, [2] in the other" in said


def test_layers_of_another_size_are_refused(folder):
    wide = {f"model.layers.{i}.{s}": torch.ones(8) for i in range(4) for s in toys.SUFFIXES}
    toys.write(folder / "WIDE", wide, toys.config(4))
    said = refused(text("overlap: 1", "LOW WIDE"), folder)
    assert "shape [8]" in said
    said = refused(text("overlap: 1, overlap_mode: sum", "LOW WIDE"), folder)
    assert "input_layernorm.weight has shape [4] in one, [8] in the other" in said
    assert "pad, crop or project" in said


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (text("overlap: 2"), "overlap is 2, expected 0 to 1"),
        (text("target_layers: 4"), "target_layers is 4, expected 5 to 8: the model has 4 layers"),
        (text("target_layers: 6", "LOW HIGH"), "expected 7 to 10: the lower model has 4 layers"),
        (text("overlap: 4, overlap_mode: sum"), "overlap is 4, expected 0 to 3"),
        (text("target_layers: 6, overlap: 1"), "overlap stands beside target_layers"),
        (text("overlap_mode: sum"), "target_layers is missing, and so is overlap"),
        (text("overlap: 1, t: 1.5"), "t is 1.5, expected a number in [0, 1]"),
        (text("overlap: 1, overlap_mode: add"), "expected drop or sum"),
        (text("overlap: 1", "LOW HIGH", "tensors: [{match: '*', drop: true}]\nbase_model: LOW\n"),
         "takes models, and no tensors"),
        (text("target_layers: 5, block_expansion: true", "LOW HIGH"),
         "block_expansion takes one model, found 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused(folder, recipe, says):
    said = refused(recipe, folder)
    assert says in said
    assert "hint:" in said


def test_three_models_are_refused(folder):
    toys.toy(folder / "MORE")
    said = refused(text("overlap: 1", "LOW HIGH MORE"), folder)
    assert "takes one model, or a lower and an upper one, found 3" in said


def test_a_range_error_stands_where_the_parameter_does(folder):
    recipe = "merge_method: depth_upscale\nmodels: [{model: LOW}]\nparameters:\n  overlap: 2\n"
    said = refused(recipe, folder)
    assert said.startswith("<recipe>:4:12: overlap is 2")


def test_stacks_that_no_config_tells_apart_are_refused(folder):
    names = [f"{stack}.{i}.w" for stack in ("one", "two") for i in range(2)]
    toys.write(folder / "M", {name: torch.ones(2) for name in names}, None)
    said = refused(text("overlap: 0", "M"), folder)
    assert "does not say which layers make the model deep" in said
    assert "stacks here: one, two" in said


def test_a_file_without_a_config_is_as_deep_as_its_layers(folder):
    toys.write(folder / "M", {f"layers.{i}.w": torch.full((2,), float(i)) for i in range(3)}, None)
    made = toys.merge(text("overlap: 1", "M"), folder)
    assert [float(made[f"layers.{i}.w"][0]) for i in range(4)] == [0, 1, 1, 2]


def test_layers_behind_those_that_the_config_counts_stay_behind(folder):
    tensors = {f"model.layers.{i}.w": torch.full((2,), float(i)) for i in range(4)}
    toys.write(folder / "M", tensors, toys.config(3, num_nextn_predict_layers=1))
    made = toys.merge(text("target_layers: 4", "M"), folder)
    assert [float(made[f"model.layers.{i}.w"][0]) for i in range(5)] == [0, 1, 1, 2, 3]
    plan = toys.plan(text("target_layers: 4", "M"), folder)
    (config,) = [json.loads(f.text) for f in plan.side_files if f.name == "config.json"]
    assert config["num_hidden_layers"] == 4


def test_the_library_builds_it_too(folder):
    done = api.merge(
        {"merge_method": "depth_upscale", "base_model": str(folder / "LOW"),
         "parameters": {"target_layers": 7}},
        folder / "out",
    )  # fmt: skip
    assert done.plan.layers == 7
