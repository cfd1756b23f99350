"""The table and the maps of a plan say what becomes of tensors that are built."""

from __future__ import annotations

import re

import plain_models
import pytest
import torch

from merge_kit.plan.describe import counts_line, merged_by_method, summary
from merge_kit.plan.describe_json import plan_json
from merge_kit.plan.describe_steps import rule_lines
from tests.toys import plan

UPCYCLE = "merge_method: sparse_upcycle\nbase_model: a\n"
QWEN = f"{UPCYCLE}models: [{{model: b}}, {{model: c}}]\n"
PROJECT = "merge_method: project\nmodels: [{model: a}]\nparameters: {hidden_size: 4}\n"
EXPANSION = "merge_method: depth_upscale\nmodels: [{model: a}]\n"
EXPANSION += "parameters: {target_layers: 16, block_expansion: true}\n"
MEAN = "name: mean\nmerge_method: linear\nparameters: {weight: 1}\n"
MEAN += "models: [{model: a}, {model: b}]\n---\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("plans")
    for seed, name in enumerate("abc"):
        plain_models.write(root / name, "llama", 8, seed, torch.float32)
    return root


def texts(made, label):
    """Return the texts of a row and of those below it without a label of their own."""
    rows = summary(made, None)
    first = next((i for i, row in enumerate(rows) if row.label == label), len(rows))
    found = [row.text for row in rows[first : first + 1]]
    for row in rows[first + 1 :]:
        if row.label:
            break
        found.append(row.text)
    return found


def test_a_router_that_no_file_holds_is_generated(folder):
    made = plan(UPCYCLE + "parameters: {num_experts: 2, architecture: mixtral}\n", folder)
    copied = 3 + 8 * (4 + 2 + 2 * 3)  # beside the layers; attention, norms, experts
    assert counts_line(made) == f"merged 0, generated 8, copied {copied}, dropped 0 tensors"
    assert texts(made, "merged") == []
    tensors = {"merged": {}, "generated": 8, "copied": copied, "dropped": 0}
    assert plan_json(made)["tensors"] == tensors
    routers = [line for line in rule_lines(made) if ".gate.weight: " in line]
    assert [line.partition(": ")[2] for line in routers] == [
        "generated: normal numbers times 0.02"
    ] * 8


def test_zeros_of_identities_are_generated(folder):
    made = plan(EXPANSION, folder)
    assert counts_line(made).startswith("merged 0, generated 16, ")
    zeros = [line for line in rule_lines(made) if ": generated: zeros (" in line]
    assert len(zeros) == 16


def test_what_is_neither_copied_nor_merged_counts_for_the_method(folder):
    made = plan(PROJECT, folder)
    assert merged_by_method(made) == {"project": 2 + 8 * 7}
    lines = rule_lines(made)
    assert "model.layers.0.mlp.up_proj.weight: project of input-1:a" in lines
    assert "model.norm.weight: generated: 1.41421 everywhere" in lines
    assert not any("scale=" in line for line in lines)


def test_what_a_stack_takes_of_a_stage_counts_for_the_stage(folder):
    stack = "merge_method: passthrough\nslices: [{sources: [{model: mean, layer_range: [0, 2]}]}]\n"
    assert merged_by_method(plan(MEAN + stack, folder)) == {"linear": 3 + 2 * 9}


def test_what_is_found_is_said_in_words(folder):
    assert texts(plan(PROJECT, folder), "found first") == [
        "basis-0 (a basis of the embeddings, which reads 320 B)"
    ]


def test_few_operations_are_not_shown_in_teraflops(folder):
    (shown,) = texts(plan(PROJECT, folder), "solves")
    assert re.match(r"[\d.]+ MFLOP in \d+ tensors, less than 1 s with ", shown)


def test_layers_that_are_left_out_for_one_reason_are_one_row(folder):
    text = QWEN + "parameters: {architecture: qwen2_moe, sparse_layers: [0]}\n"
    rows = [row for row in texts(plan(text, folder), "dropped") if "dense" in row]
    (row,) = rows
    said = "42, each of layers 1, 2, 3 and 4 more stays dense, as in input-3:a: "
    assert row.startswith(said)


def test_one_layer_that_is_left_out_is_named(folder):
    text = QWEN + "parameters: {architecture: qwen2_moe, sparse_layers: [0, 1, 2, 3, 4, 5, 6]}\n"
    rows = [row for row in texts(plan(text, folder), "dropped") if "dense" in row]
    assert [row.partition(":")[0] for row in rows] == ["6, layer 7 stays dense, as in input-3"]
