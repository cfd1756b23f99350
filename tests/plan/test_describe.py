from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from merge_kit.core.tensors import ByteSpan, TensorSpec
from merge_kit.io.values import WeightFile
from merge_kit.methods.base import PerModel
from merge_kit.methods.linear import Linear
from merge_kit.methods.slerp import Slerp
from merge_kit.plan.describe import Row, first_of, summary
from merge_kit.plan.describe_json import plan_json
from merge_kit.plan.describe_steps import layer_lines, origin, rule_lines
from merge_kit.plan.sources import Generated, LowRank, Merged, Rows, Stored, View
from merge_kit.plan.values import (
    Bill,
    Fate,
    LayerOrigin,
    Plan,
    PlanInput,
    Shard,
    SideFile,
    Step,
    Target,
)


def stored(model: str, start: int = 0) -> Stored:
    return Stored(ByteSpan(Path(f"/models/{model}.safetensors"), start, start + 8), "F32", (2,))


def target(name: str) -> Target:
    return Target(name, TensorSpec(name, "F32", (2,)), 0, 100)


def model(key: str, name: str, *, is_base: bool = False) -> PlanInput:
    file = WeightFile("model.safetensors", Path(f"/models/{name}.safetensors"), 1_500_000, 7)
    return PlanInput(key, name, f"models/{name}", Path("/models"), (file,), is_base=is_base)


@pytest.fixture
def plan() -> Plan:
    steps = (
        Step(
            "merge",
            (target("layers.0.up"),),
            (stored("a"), stored("b")),
            ("input-1", "input-2"),
            Linear(weight=PerModel((0.25, 0.75))),
            weights=(0.25, 0.75),
        ),
        Step(
            "merge",
            (target("norm"),),
            (stored("b", 8),),
            ("input-2",),
            Slerp(t=0.5),
            base=stored("a", 8),
            weights=(1.0,),
        ),
        Step("copy", (target("steps"),), (stored("a", 16),), ("input-1",), note="integers agree"),
    )
    return Plan(
        method="linear",
        steps=steps,
        shards=(Shard("model.safetensors", b"12345678{}", 34),),
        side_files=(
            SideFile("tokenizer.json", source=Path("/models/tokenizer.json")),
            SideFile("config.json", text="{}"),
        ),
        inputs=(model("input-1", "a", is_base=True), model("input-2", "b")),
        fates=(
            Fate("input-1", "layers.0.up", "merged"),
            Fate("input-1", "norm", "merged"),
            Fate("input-1", "steps", "copied"),
            Fate("input-2", "layers.0.up", "merged"),
            Fate("input-2", "norm", "merged"),
            Fate("input-2", "lm_head", "dropped", "tied to its embedding"),
        ),
        layer_map=(
            LayerOrigin("layers", 0, (("input-1", 2), ("input-2", 0))),
            LayerOrigin("layers", 1, (("input-1", 3), ("input-2", 1))),
            LayerOrigin("layers", 2, (("input-1", 3), ("input-2", 2))),
        ),
        architecture="llama",
        layers=3,
        parameters=1_240_000_000,
        dtypes=(("F32", 3),),
        bill=Bill(3_000_000, 2_480_000, 0, 600_000_000, 2),
        notes=("int8_mask has no effect",),
        identity="abc",
        seed=7,
    )


def texts(rows: list[Row]) -> dict[str, list[str]]:
    """Return the texts of each label; a row without one belongs to the label above."""
    by_label: dict[str, list[str]] = {}
    label = ""
    for row in rows:
        label = row.label or label
        by_label.setdefault(label, []).append(row.text)
    return by_label


def test_the_summary_accounts_for_every_tensor(plan):
    rows = texts(summary(plan, 10_000_000))
    assert rows["tensors"] == ["merged 2, copied 1, dropped 1 tensors"]
    assert rows["merged"] == ["1 by linear", "1 by slerp"]
    assert rows["dropped"] == ["1, tied to its embedding: lm_head of input-2"]


def test_the_summary_shows_the_inputs_as_they_were_written(plan):
    assert texts(summary(plan, None))["inputs"] == [
        "input-1, base: models/a (3 tensors, 1.5 MB)",
        "input-2: models/b (3 tensors, 1.5 MB)",
    ]


def test_the_summary_shows_the_model_and_the_bill(plan):
    rows = texts(summary(plan, 10_000_000))
    assert rows["method"] == ["linear, seed 7"]
    assert rows["model"] == ["llama, 3 layers, 1.24 B parameters"]
    assert rows["dtypes"] == ["F32 3"]
    assert rows["read"] == ["3 MB"]
    assert rows["write"] == ["2.48 MB in 1 shard"]
    assert rows["peak memory"] == ["600 MB with 2 threads"]
    assert rows["side files"] == ["1 copied: tokenizer.json", "1 written: config.json"]
    assert rows["notes"] == ["int8_mask has no effect"]
    assert "scratch" not in rows


def test_disk_that_is_too_small_is_said_with_the_missing_bytes(plan):
    scratch = replace(plan, bill=replace(plan.bill, scratch_bytes=520_000))
    rows = texts(summary(scratch, 1_000_000))
    assert rows["scratch"] == ["520 kB"]
    assert rows["free disk"] == ["1 MB, 2 MB too little"]
    assert texts(summary(scratch, 3_000_000))["free disk"] == ["3 MB"]
    assert "free disk" not in texts(summary(plan, None))


def test_drops_are_grouped_by_reason_and_only_the_first_are_named(plan):
    fates = tuple(Fate("input-2", f"head.{i}", "dropped", "a rule drops it") for i in range(5))
    rows = texts(summary(replace(plan, fates=plan.fates + fates), None))
    assert rows["dropped"][1] == (
        "5, a rule drops it: head.0 of input-2, head.1 of input-2, head.2 of input-2 and 2 more"
    )


def test_names_are_listed_up_to_the_limit():
    assert first_of(["a", "b", "c"]) == "a, b, c"
    assert first_of(["a", "b", "c", "d"]) == "a, b, c and 1 more"


def test_a_revision_is_shown_with_its_model(plan):
    pinned = replace(plan.inputs[0], text="org/a", hub_id="org/a", revision="9f3c")
    rows = texts(summary(replace(plan, inputs=(pinned,)), None))
    assert rows["inputs"] == ["input-1, base: org/a at 9f3c (3 tensors, 1.5 MB)"]


def test_layers_are_compressed_to_runs_that_advance_together(plan):
    assert layer_lines(plan) == [
        "layers 0-1 from input-1:a 2-3, input-2:b 0-1",
        "layers 2 from input-1:a 3, input-2:b 2",
    ]


def test_layers_that_stay_are_not_listed(plan):
    lines = layer_lines(replace(plan, layer_map=()))
    assert lines == ["no layer is moved: each comes from the layers of the same number"]


def test_stacks_are_never_joined(plan):
    origins = (
        LayerOrigin("encoder", 0, (("input-1", 0),)),
        LayerOrigin("decoder", 1, (("a stage", 1),)),
    )
    assert layer_lines(replace(plan, layer_map=origins)) == [
        "encoder 0 from input-1:a 0",
        "decoder 1 from a stage 1",
    ]


def test_every_output_tensor_has_one_rule(plan):
    assert rule_lines(plan) == [
        "layers.0.up: linear(normalize=true) of input-1:a * 0.25, input-2:b * 0.75",
        "norm: slerp(t=0.5, flatten=true) of base input-1:a, input-2:b",
        "steps: copy input-1:a (integers agree)",
    ]


def test_origins_are_found_through_every_kind_of_source(plan):
    files = {Path("/models/a.safetensors"): "input-1/model.safetensors"}
    weight, step = stored("a"), plan.steps[0]
    low_rank = LowRank(weight, stored("x"), stored("y"), 1.0, (2,))
    assert origin(Rows(View(weight, 0, (2,)), (1, 0)), files) == "input-1"
    assert origin(low_rank, files) == "input-1"
    assert origin(replace(low_rank, weight=None), files) == "x.safetensors"
    assert origin(Merged(step, "F32", (2,)), files) == "an earlier stage"
    assert origin(Generated("zeros", (2,)), files) == "generated numbers"


def test_the_json_plan_holds_every_step_with_its_parameters_and_bytes(plan):
    described = plan_json(plan)
    assert described["tensors"] == {"merged": {"linear": 1, "slerp": 1}, "copied": 1, "dropped": 1}
    first = described["steps"][0]
    assert first["method"] == {
        "name": "linear",
        "parameters": {"weight": [0.25, 0.75], "normalize": True},
    }
    assert first["inputs"][0] == {
        "kind": "Stored",
        "span": {"path": "input-1/model.safetensors", "start": 0, "stop": 8},
        "dtype": "F32",
        "shape": [2],
    }
    assert described["shards"] == [{"name": "model.safetensors", "nbytes": 34, "header_nbytes": 10}]


def test_the_json_plan_shows_the_stage_that_feeds_another(plan):
    fed = replace(plan.steps[2], inputs=(Merged(plan.steps[0], "BF16", (2,), spill=64),))
    source = plan_json(replace(plan, steps=(fed,)))["steps"][0]["inputs"][0]
    assert (source["kind"], source["dtype"], source["spill"]) == ("Merged", "BF16", 64)
    assert source["step"]["method"]["name"] == "linear"


def test_the_json_plan_is_the_same_text_whenever_the_files_were_touched(plan):
    touched = tuple(
        replace(entry, files=tuple(replace(file, mtime_ns=9) for file in entry.files))
        for entry in plan.inputs
    )
    again = plan_json(replace(plan, inputs=touched))
    assert json.dumps(again, allow_nan=False) == json.dumps(plan_json(plan), allow_nan=False)
