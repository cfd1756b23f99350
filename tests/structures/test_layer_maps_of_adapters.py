"""The map of layers names the adapters that are applied to a model."""

from __future__ import annotations

from pathlib import Path

from merge_kit.plan.describe_steps import layer_lines
from tests.toys import plan

ROOT = Path(__file__).parents[2] / "recipes"
ONE = "input-2:base+input-1:adapter-sort"


def test_a_deeper_model_of_an_adapter_names_it():
    text = "merge_method: depth_upscale\nbase_model: demo/base\nparameters: {overlap: 1}\n"
    lines = layer_lines(plan(text + "models: [{model: demo/adapter-sort}]\n", ROOT))
    assert lines
    assert all(f"from {ONE} " in line for line in lines)


def test_experts_that_are_adapters_are_named_beside_the_base():
    text = "merge_method: sparse_upcycle\nbase_model: demo/base\nmodels:\n"
    text += "  - {model: demo/adapter-sort}\n  - {model: demo/adapter-translate}\n"
    (line,) = layer_lines(plan(text, ROOT))
    assert "from input-3:base 0-" in line
    assert "input-3:base+input-1:adapter-sort 0-" in line
    assert "input-3:base+input-2:adapter-translate 0-" in line
