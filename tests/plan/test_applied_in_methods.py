"""Models with adapters in methods, stages, slices and rules; what is refused."""

from __future__ import annotations

import pytest
import torch

from merge_kit.errors import CheckpointError, MismatchError, PlanError
from merge_kit.plan.sources import Generated, LowRank, Stored
from merge_kit.plan.walk import stored
from tests.plan.adapters_by_hand import (
    EMBEDDING,
    HIDDEN,
    NORM,
    ON_Q,
    ON_UP,
    PREFIX,
    SAVED,
    TOKENS,
    UP,
    Q,
    adapter,
    base,
    before,
    change,
    changed_by,
    dora,
    factors,
    fates,
    numbers,
    passed,
    problem_of,
    rows,
    weighed,
    write_models,
)
from tests.toys import merge, plan, write


@pytest.fixture
def models(tmp_path):
    return write_models(tmp_path)


# in methods ---------------------------------------------------------------------------------------

TASKS = """
merge_method: task_arithmetic
base_model: {}
models: [{{model: {}, parameters: {{weight: 0.5}}}}, {{model: {}, parameters: {{weight: -2}}}}]
"""


def steps_by_name(made):
    return {step.outputs[0].key: step for step in made.steps}


def test_methods_on_differences_get_the_changes_and_read_the_base_once(models):
    made = steps_by_name(plan(TASKS.format("base", "base+a", "base+b"), models))
    step = made[f"{Q.format(0)}.weight"]
    assert step.deltas == (True, True)
    assert isinstance(step.inputs[0], LowRank)
    assert step.inputs[0].weight is None
    assert step.inputs[1] == Generated("zeros", (HIDDEN, HIDDEN))
    assert isinstance(step.base, Stored)
    result = merge(TASKS.format("base", "base+a", "base+b"), models)
    name = f"{Q.format(0)}.weight"
    assert torch.equal(result[name], before(models)[name] + change(ON_Q, Q.format(0), 1.0).float())


def test_an_adapter_alone_is_the_base_with_it(models):
    alone = plan(TASKS.format("base", "a", "b"), models)
    written = plan(TASKS.format("base", "base+a", "base+b"), models)
    assert [step.inputs for step in alone.steps] == [step.inputs for step in written.steps]


def test_a_difference_from_a_base_with_an_adapter_leaves_out_what_both_have(models):
    made = steps_by_name(plan(TASKS.format("base+a", "base+a+b", "b"), models))
    step = made[f"{Q.format(0)}.weight"]
    assert step.deltas == (True, True)
    assert step.inputs == (Generated("zeros", (HIDDEN, HIDDEN)),) * 2
    assert isinstance(step.base, LowRank)
    up = made[f"{UP.format(1)}.weight"]
    assert all(isinstance(one, LowRank) and one.weight is None for one in up.inputs)


def test_a_difference_from_a_base_takes_off_what_only_the_base_has(models):
    recipe = TASKS.format("base+a", "base+b", "base+a")
    step = steps_by_name(plan(recipe, models))[f"{Q.format(0)}.weight"]
    assert len(step.inputs) == 1  # the base is no task of its own
    assert isinstance(step.inputs[0], LowRank)
    assert step.inputs[0].scale == -2.0
    name = f"{Q.format(0)}.weight"
    half = change(ON_Q, Q.format(0), 1.0).float()
    result = merge(recipe, models)
    assert torch.equal(result[name], before(models)[name] + half)


def test_what_is_no_sum_of_changes_is_subtracted(models):
    adapter(models / "s", ON_Q | SAVED, modules_to_save=["norm"])
    made = steps_by_name(plan(TASKS.format("base", "s", "b"), models))
    assert made[NORM].deltas == (False, True)
    result = merge(TASKS.format("base", "s", "b"), models)
    norm = before(models)[NORM]
    assert torch.equal(result[NORM], norm + 0.5 * (SAVED[NORM] - norm))


def test_methods_on_models_get_the_models(models):
    recipe = "{merge_method: linear, parameters: {weight: 1}, models: "
    recipe += "[{model: base+a}, {model: base+b}]}"
    step = steps_by_name(plan(recipe, models))[f"{Q.format(0)}.weight"]
    assert step.deltas == ()
    assert len(list(stored(step.inputs[0]))) == 3
    name = f"{Q.format(0)}.weight"
    result = merge(recipe, models)
    assert torch.equal(result[name], before(models)[name] + change(ON_Q, Q.format(0), 1.0).float())


def test_an_adapter_on_the_result_of_a_stage(models):
    recipe = """
name: halves
merge_method: linear
models: [{model: base, parameters: {weight: 1}}, {model: base+b, parameters: {weight: 1}}]
---
merge_method: passthrough
models: [{model: halves+a}]
"""
    result = merge(recipe, models)
    q, up = f"{Q.format(0)}.weight", f"{UP.format(1)}.weight"
    assert torch.equal(result[q], before(models)[q] + change(ON_Q, Q.format(0)).float())
    assert torch.equal(result[up], before(models)[up] + change(ON_UP, UP.format(1), 1.0).float())
    made = plan(recipe, models)
    assert {what for what, _ in fates(made, "input-2").values()} == {"merged"}
    assert {what for what, _ in fates(made, "input-3").values()} == {"merged"}
    tasks = recipe.replace("passthrough", "task_arithmetic").replace(
        "models: [{model: halves+a}]",
        "base_model: halves\nmodels: [{model: a, parameters: {weight: 1}}]",
    )
    assert not changed_by(merge(tasks, models), result)


def test_layers_that_no_slice_takes_drop_the_changes_of_theirs(models):
    recipe = """
merge_method: passthrough
slices: [{sources: [{model: base+a+b, layer_range: [1, 2]}]}]
"""
    made = plan(recipe, models)
    assert set(fates(made, "input-2").values()) == {("dropped", "in no slice")}
    assert {what for what, _ in fates(made, "input-3").values()} == {"merged"}
    result = merge(recipe, models)
    name = UP.format(1)
    wanted = before(models)[f"{name}.weight"] + change(ON_UP, name).float()
    assert torch.equal(result[f"{UP.format(0)}.weight"], wanted)


def test_a_rule_may_copy_from_a_model_with_an_adapter(models):
    name = f"{Q.format(0)}.weight"
    recipe = f"base_model: base\ntensors: [{{match: '{name}', copy: base+a}}]\n"
    result = merge(recipe, models)
    assert changed_by(result, before(models)) == {name}
    why = set(fates(plan(recipe, models), "input-2").values())
    assert why == {("merged", "")}


def test_a_rule_that_drops_a_tensor_drops_its_change(models):
    recipe = "base_model: base+a\ntensors: [{match: '*q_proj*', drop: true}]\n"
    made = fates(plan(recipe, models), "input-2")
    assert set(made.values()) == {("dropped", "rule '*q_proj*'")}


# what is refused ----------------------------------------------------------------------------------


def test_modules_that_the_base_lacks_are_counted_and_the_first_named(models):
    parts = dict(ON_Q)
    for i in range(7):
        parts |= factors(f"model.layers.{i}.mlp.other_proj", 5, HIDDEN)
    adapter(models / "x", parts)
    error = problem_of(passed("base+x"), models)
    assert isinstance(error, MismatchError)
    assert error.where == "input-2:x"
    assert error.problem.startswith("7 of 8 modules are not in input-1:base: model.layers.0.mlp.")
    assert error.problem.count("other_proj") == 5
    assert error.problem.endswith(", ...")


def test_shapes_that_differ_are_named(models):
    adapter(models / "x", factors(UP.format(0), 5, HIDDEN + 1), base_model_name_or_path="org/big")
    error = problem_of(passed("base+x"), models)
    name = UP.format(0)
    assert f"{name} changes a weight of [5, 4], {name}.weight is [5, 3]" in error.problem
    assert "org/big" in error.hint


def test_lengths_of_dora_must_be_one_an_output(models):
    adapter(models / "x", ON_Q | dora(Q.format(0), torch.ones(4)), use_dora=True)
    assert isinstance(problem_of(passed("base+x"), models), CheckpointError)


def test_a_bias_that_the_base_lacks_is_refused(models):
    adapter(models / "x", ON_Q | {f"{Q.format(0)}.lora_B.bias": torch.ones(3)}, lora_bias=True)
    error = problem_of(passed("base+x"), models)
    assert f"changes a bias, and input-1:base has no {Q.format(0)}.bias" in error.problem


def test_an_adapter_without_a_model_is_refused_with_what_to_write(models):
    recipe = "{merge_method: linear, parameters: {weight: 1}, models: [{model: a}, {model: b}]}"
    error = problem_of(recipe, models)
    assert isinstance(error, PlanError)
    assert "input-1:a is an adapter" in error.problem
    assert "write MODEL+a" in error.hint


def test_an_adapter_is_no_base_and_a_model_no_adapter(models):
    assert "is an adapter" in problem_of(TASKS.format("a", "base", "base+b"), models).problem
    assert "begins with an adapter" in problem_of(passed("a+b"), models).problem
    assert isinstance(problem_of(passed("base+base"), models), CheckpointError)
    assert "no folder or file" in problem_of(passed("base+nowhere"), models).problem


def test_every_adapter_that_does_not_fit_is_in_one_list(models):
    adapter(models / "x", factors(UP.format(0), 5, HIDDEN + 1))
    adapter(models / "y", factors("model.other", 5, HIDDEN))
    message = str(problem_of(TASKS.format("base", "x", "base+y"), models))
    assert "input-2:x: does not fit" in message or "input-1:x: does not fit" in message
    assert "1 of 1 modules are not in" in message


def test_a_quantised_base_takes_no_adapter(tmp_path):
    base(tmp_path / "base", quantization_config={"quant_method": "gptq"})
    adapter(tmp_path / "a", ON_Q)
    error = problem_of(passed("base+a"), tmp_path)
    assert "quantised" in error.problem
    assert "to which no adapter can be added" in error.problem


def test_a_module_that_could_be_two_tensors_is_refused_with_both(tmp_path):
    tensors = {f"{side}.blocks.0.proj.weight": numbers(5, HIDDEN) for side in ("left", "right")}
    write(tmp_path / "base", tensors, {"model_type": "two"})
    adapter(tmp_path / "a", factors("blocks.0.proj", 5, HIDDEN))
    error = problem_of(passed("base+a"), tmp_path)
    assert "could be left.blocks.0.proj.weight or right.blocks.0.proj.weight" in error.problem


ONE = torch.ones(1, 1)
NORM_SAVED = {"modules_to_save": ["norm"]}


def test_two_modules_that_are_one_tensor_are_refused(models):
    held = {"visual.norm.weight": numbers(HIDDEN), "text.model.norm.weight": numbers(HIDDEN)}
    write(models / "other", {"model.norm.weight": numbers(HIDDEN), "x.weight": ONE}, {})
    adapter(models / "x", held | factors("x", 1, 1), modules_to_save=["norm"])
    error = problem_of(passed("other+x"), models)
    assert "are not in input-1:other: visual.norm.weight" in error.problem
    del held["visual.norm.weight"]
    adapter(models / "y", held | {NORM: numbers(HIDDEN)} | factors("x", 1, 1), **NORM_SAVED)
    error = problem_of(passed("other+y"), models)
    assert error.problem == "two of its modules are model.norm.weight"


def test_weights_of_whole_numbers_take_no_change(models):
    write(models / "whole", {"x.weight": torch.ones(5, HIDDEN, dtype=torch.int32)}, {})
    adapter(models / "x", factors("x", 5, HIDDEN))
    assert "x.weight holds I32, no floats" in problem_of(passed("whole+x"), models).problem


def test_whole_numbers_that_are_held_whole_have_no_weight(models):
    counts = {"norm.count": torch.tensor([3])}
    write(models / "whole", {"x.weight": numbers(5, HIDDEN)} | counts, {})
    held = {"norm.count": torch.tensor([4])} | factors("x", 5, HIDDEN)
    adapter(models / "x", held, **NORM_SAVED)
    assert merge(passed("whole+x"), models)["norm.count"].tolist() == [4]
    error = problem_of(passed(weighed("whole", x=0.5)), models)
    assert "holds norm.count, of I64, whole; it cannot be weighed by 0.5" in error.problem


def test_whole_numbers_that_differ_are_settled_as_in_models(models):
    counts = {"norm.count": torch.tensor([3])}
    write(models / "whole", {"x.weight": numbers(5, HIDDEN)} | counts, {})
    held = {"norm.count": torch.tensor([4])} | factors("x", 5, HIDDEN)
    adapter(models / "x", held, **NORM_SAVED)
    recipe = TASKS.format("whole", "x", "whole+x") + "on_conflict: base\n"
    assert merge(recipe, models)["norm.count"].tolist() == [3]
    made = plan(recipe, models)
    assert [one.name for one in made.inputs] == ["x", "whole"]
    assert fates(made, "input-2")["norm.count"] == ("copied", "")
    held_whole = fates(made, "input-1")[f"{PREFIX}norm.count"]
    assert held_whole == ("dropped", "on_conflict: base")


def test_rows_beyond_the_vocabulary_are_refused(models):
    held, at = rows("model.embed_tokens", [1, TOKENS], 1)
    adapter(models / "x", ON_Q | held, **at)
    error = problem_of(passed("base+x"), models)
    assert "rows of model.embed_tokens up to 4 are [2, 3]" in error.problem
    assert f"{EMBEDDING} is [4, 3]" in error.problem
