"""Every tensor is merged, copied or dropped by name, whatever a recipe asks for."""

from __future__ import annotations

import json
import math
import time
from copy import deepcopy

import pytest
import toys
import yaml
from bench_of_faults import RECIPE, WEIGHTS, Bench
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from merge_kit.errors import MergeKitError
from merge_kit.plan.describe_json import plan_json

STACK = """\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [0, 1]}]
"""


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys) -> Bench:
    monkeypatch.chdir(tmp_path)
    return Bench(tmp_path, capsys)


# every tensor is accounted for ------------------------------------------------------------------

STAGE = """\
name: first
merge_method: linear
models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 1}}
---
"""
ACCOUNTS = {
    "models": RECIPE,
    "slices": STACK,
    "modules": "merge_method: linear\nbase_model: a\nmodules: {model.layers: {models: [{model: a}, "
    "{model: b}]}}\nparameters: {weight: 1}\n",
    "rules": "base_model: a\ntensors: [{match: '*norm*', copy: b}, {match: 'lm*', drop: true}]\n",
    "a stage that is sliced": STAGE
    + "merge_method: passthrough\nslices: [{sources: [{model: first, layer_range: [1, 2]}]}]\n",
    "a stage that rules cut": STAGE
    + "base_model: first\ntensors: [{match: '*norm*', drop: true}, {match: 'lm*', copy: b}]\n",
    "a stage that is hardly used": STAGE
    + "base_model: a\ntensors: [{match: '*.norm.*', copy: first}]\n",
}


@pytest.mark.parametrize("form", ACCOUNTS)
def test_a_tensor_is_said_to_be_dropped_if_and_only_if_no_output_byte_depends_on_it(bench, form):
    text, models = ACCOUNTS[form], {name: load_file(bench / name / WEIGHTS) for name in "ab"}

    def merged_with(changed):
        for name, tensors in models.items():
            scaled = {t: x * 3 if (name, t) in changed else x for t, x in tensors.items()}
            save_file(scaled, bench / name / WEIGHTS)
        return {t: x.tolist() for t, x in toys.merge(text, bench.folder).items()}

    plan = toys.plan(text, bench.folder)
    names = {model.key: model.name for model in plan.inputs}
    fate = {(names[f.model], f.tensor): f.what for f in plan.fates}
    assert set(fate) == {(names[m.key], t) for m in plan.inputs for t in models[names[m.key]]}
    untouched = merged_with(())
    for tensor, what in fate.items():
        assert (merged_with({tensor}) == untouched) is (what == "dropped"), tensor


# stages that feed one another --------------------------------------------------------------------


def document(name, *models):
    listed = "".join(f"- {{model: {model}, parameters: {{weight: 1}}}}\n" for model in models)
    return f"name: {name}\nmerge_method: linear\nmodels:\n{listed}---\n"


def chain(count, *feeds):
    """Return the mean of the mean ... of a and b: stage i has b and the stages i - feeds."""
    text = document("s0", "a", "b")
    for i in range(1, count):
        text += document(f"s{i}", *dict.fromkeys(f"s{max(i - back, 0)}" for back in feeds), "b")
    return text


def test_a_hundred_stages_are_planned_soon_and_their_bill_is_a_sum(bench):
    begun = time.process_time()  # whatever else the machine does
    plan = toys.plan(chain(100, 1), bench.folder, threads=1)
    assert time.process_time() - begun < 60  # not without end
    (short,) = {step.peak_bytes for step in toys.plan(chain(1, 1), bench.folder).steps}
    assert {step.peak_bytes for step in plan.steps} == {100 * short}


def test_the_stages_of_a_chain_are_merged_in_order(bench):
    merged = toys.merge(chain(3, 1), bench.folder)
    assert toys.outside(merged) == [2.75] * 3  # 2, then 2.5, then 2.75


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (chain(101, 1), "101 stages feed one another up to this one, at most 100"),
        (chain(1000, 1), "101 stages feed one another up to this one, at most 100"),
        (chain(60, 1, 2), "merges for each tensor, at most 1,000 are allowed"),
    ],
)
def test_stages_that_would_take_for_ever_are_refused(bench, text, problem):
    bench.recipe(text)
    bench.refused(2, "recipe.yaml:", problem)


# recipes that were changed at random -------------------------------------------------------------

SLERP = """\
merge_method: slerp
base_model: a
models: [{model: b}]
parameters: {t: [{filter: mlp, value: [0, 0.5, 1]}, {value: 0.3}], flatten: false}
"""
SEEDS = [
    RECIPE + "dtype: bfloat16\nparameters: {normalize: false}\nseed: 3\n",
    STACK + "shard_size: 200\nout_dtype: float16\n",
    SLERP,
    STAGE + "merge_method: slerp\nbase_model: first\nmodels: [{model: a}]\nparameters: {t: 0.5}\n",
    *ACCOUNTS.values(),
]
VALUES = [
    *("a", "b", "first", "a@x", "./a", "nowhere", "", "*", "*norm*", "linear", "slerp", "float16"),
    *(None, True, -1, 0, 2, 0.5, 1e30, math.nan, math.inf, 10**30, [], {}, [0, 2], [2, 0], [[1]]),
    *([{"value": 1}], {"filter": "x", "value": 1}, [{"model": "a"}], {"weight": [1, 2]}),
    *([{"match": "*", "copy": "a"}], [{"match": "*mlp*", "drop": True}, {"match": "*"}]),
    [{"sources": [{"model": "a", "layer_range": [0, 2]}]}],
    {"model.layers": {"models": [{"model": "a"}, {"model": "b"}]}},
]
KEYS = [
    *("merge_method", "models", "slices", "modules", "tensors", "base_model", "parameters", "name"),
    *("dtype", "seed", "shard_size", "on_conflict", "model", "weight", "t", "sources", "value"),
    *("layer_range", "match", "copy", "drop", "filter", "tokenizer_source", "x"),
]


def places(value, path=()):
    """Yield the containers in a value, and a key in each."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield value, key
        yield from places(value[key])


def change(documents, chance):
    """Replace, remove, add, rename or repeat something in a recipe."""
    container, key = chance.choice([*places(documents)])
    value = deepcopy(chance.choice(VALUES))
    action = chance.choice(["replace", "replace", "remove", "add", "rename", "repeat"])
    if action == "replace":
        container[key] = value
    elif action == "remove" or not documents:
        del container[key]
    elif action == "add" and isinstance(container[key], dict):
        container[key][chance.choice(KEYS)] = value
    elif action == "rename" and isinstance(container, dict):
        container[chance.choice(KEYS)] = container.pop(key)
    elif isinstance(container, list):
        container.insert(key, value if action == "add" else deepcopy(container[key]))


@given(st.randoms(use_true_random=False), st.sampled_from(SEEDS), st.integers(1, 3))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_recipe_changed_at_random_is_planned_in_full_or_refused_in_words(
    bench, chance, seed, times
):
    documents = list(yaml.safe_load_all(seed))
    for _ in range(times):
        if documents:
            change(documents, chance)
    text = yaml.safe_dump_all(documents, sort_keys=False)
    try:
        plan = toys.plan(text, bench.folder)
    except MergeKitError as error:
        plan, problem = None, str(error)
    if plan is None:
        assert problem
        return
    json.dumps(plan_json(plan), allow_nan=False)
    fates = {(fate.model, fate.tensor) for fate in plan.fates}
    held = {model.key: load_file(model.root / WEIGHTS) for model in plan.inputs}
    assert fates == {(key, tensor) for key, tensors in held.items() for tensor in tensors}
    keys = [target.key for step in plan.steps for target in step.outputs]
    assert len(keys) == len(set(keys))
