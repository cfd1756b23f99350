"""What is found before a run, in record, card, last lines, bill and progress."""

from __future__ import annotations

import json

import plain_models
import pytest
import torch

from merge_kit.cli import main
from merge_kit.engine import artefacts
from merge_kit.engine.run import run_plan
from merge_kit.plan import finishing
from merge_kit.plan.building.matching_task import ExpertMatching
from merge_kit.plan.describe_orders import order_lines
from merge_kit.publish.card import model_card
from merge_kit.publish.manifest import manifest, read_manifest
from tests.toys import plan

MIXTURE = """
name: {0}
merge_method: sparse_upcycle
base_model: a
models: [{{model: {1}}}, {{model: {2}}}, {{model: {3}}}]
parameters: {{architecture: mixtral, router: random, noise_scale: {4}}}
---
"""
STAGES = MIXTURE.format("first", *"abc", 0) + MIXTURE.format("second", *"cab", 0.001)
MATCH = STAGES + "merge_method: match_experts\nbase_model: first\nmodels: [{model: second}]\n"
EXPERTS = "second, model.layers.{}.block_sparse_moe.experts"
CARD = {"recipe_text": MATCH, "nonfinite": {}}
RECORD = {**CARD, "hashes": {}, "saturated": {}, "versions": {}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("found")
    for seed, name in enumerate("abc"):
        plain_models.write(root / name, "llama", 2, seed, torch.float32)
    return root


@pytest.fixture(scope="module")
def matched(folder, tmp_path_factory):
    made, out = plan(MATCH, folder), tmp_path_factory.mktemp("out")
    return made, run_plan(made, out)


def test_the_record_says_which_expert_stands_where(matched, tmp_path):
    made, report = matched
    text = manifest(made, orders=report.orders, **RECORD)
    (tmp_path / "merge_kit.json").write_text(text)
    found = read_manifest(tmp_path).orders
    assert found.keys() == {EXPERTS.format(layer) for layer in range(2)}
    for order in found.values():
        assert order.experts == (1, 2, 0)  # c, a, b becomes a, b, c
        assert all(0 < distance < 0.01 for distance in order.distances)


def test_a_record_without_orders_is_read_as_ever(matched, tmp_path):
    values = json.loads(manifest(matched[0], **RECORD))
    del values["orders"]
    (tmp_path / "merge_kit.json").write_text(json.dumps(values))
    assert read_manifest(tmp_path).orders == {}


@pytest.mark.parametrize(
    "order",
    [
        {"experts": [0, 0], "distances": [0.0, 0.0]},
        {"experts": [1, 2], "distances": [0.0, 0.0]},
        {"experts": [1, 0], "distances": [0.0]},
        {"experts": [1, 0], "distances": [0.0, "x"]},
        {"experts": [1.5, 0], "distances": [0.0, 0.0]},
        {"experts": [0], "distances": [0.0], "more": 1},
        [0, 1],
    ],
)
def test_an_order_that_is_none_is_refused(matched, tmp_path, order):
    values = json.loads(manifest(matched[0], **RECORD))
    (tmp_path / "merge_kit.json").write_text(json.dumps(values | {"orders": {"x": order}}))
    with pytest.raises(Exception, match="is no record of a merge"):
        read_manifest(tmp_path)


def test_the_card_shows_the_order_of_each_layer(matched):
    made, report = matched
    lines = model_card(made, orders=report.orders, **CARD).splitlines()
    assert "## Experts" in lines
    rows = [line for line in lines if line.startswith("| `second, ")]
    assert [row.split(" | ")[:2] for row in rows] == [
        [f"| `{EXPERTS.format(layer)}`", "1, 2, 0"] for layer in range(2)
    ]


def test_the_card_of_many_experts_stays_short(matched):
    order = [(e, 0.25) for e in reversed(range(128))]
    many = {f"input-1:m, model.layers.{i}.mlp.experts": order for i in range(94)}
    lines = model_card(matched[0], orders=many, **CARD).splitlines()
    rows = [line for line in lines if line.startswith("| `input-1:m, ")]
    assert len(rows) == 24
    assert rows[0].endswith(
        "| 127, 126, 125, 124, 123, 122, 121, 120, 119, 118, 117, 116, 115, "
        "114, 113, 112 and 112 more | 25.00% |"
    )
    assert "And 70 more, in the record beside this card." in lines


def test_a_run_ends_with_one_line_a_model():
    one, other = [(1, 0.5), (0, 0.25)], [(0, 0.0), (1, 0.0)]
    orders = {"m, layers.0": one, "m, layers.1": other}
    assert order_lines(orders) == [
        "m: 2 of 4 experts in 2 layers moved; matched ones are 0.00% to 50.00% apart"
    ]
    many = {f"m{i}, layers.0": other for i in range(5)}
    assert order_lines(many)[-1] == "and 2 models more"
    assert len(order_lines(many)) == 4
    assert order_lines({}) == []


def test_the_command_says_what_was_matched(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (tmp_path / "match.yaml").write_text(MATCH)
    assert main(["run", str(tmp_path / "match.yaml"), "-o", str(tmp_path / "out")]) == 0
    assert "\nsecond: 6 of 6 experts in 2 layers moved; matched ones are 0." in (
        capsys.readouterr().out
    )
    again = ["run", str(tmp_path / "match.yaml"), "-o", str(tmp_path / "out"), "--overwrite"]
    assert main([*again, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["orders"] == {EXPERTS.format(layer): [1, 2, 0] for layer in range(2)}


def test_what_stages_spill_for_what_is_found_is_billed(folder, tmp_path, monkeypatch):
    made, taken = plan(MATCH, folder), []
    search = artefacts.FINDERS[ExpertMatching]

    def watched(task, operands, stop):
        found = search(task, operands, stop)
        files = (tmp_path / ".merge_kit").glob("scratch-*")
        taken.append(sum(file.stat().st_size for file in files))
        return found

    monkeypatch.setitem(artefacts.FINDERS, ExpertMatching, watched)
    run_plan(made, tmp_path)
    # three matrices of 12 x 8 floats of each of three experts; the first mixture's are in files
    assert made.bill.scratch_bytes == 3 * 3 * 12 * 8 * 4
    assert taken == [made.bill.scratch_bytes] * 2


def test_what_is_found_of_files_spills_nothing(folder):
    text = "merge_method: project\nmodels: [{model: a}]\nparameters: {hidden_size: 4}\n"
    assert plan(text, folder).bill.scratch_bytes == 0


def test_progress_counts_what_is_read_to_find(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(artefacts, "_TELLING_BYTES", 1)
    made, events = plan(MATCH, folder), []
    run_plan(made, tmp_path, on_progress=events.append)
    keys = {one.key for one in made.artefacts}
    told = [event for event in events if event.tensor in keys]
    assert {event.tensor for event in told} == keys
    done = [event.done_bytes for event in events]
    assert done == sorted(done)
    finding = sum(one.read_bytes for one in made.artefacts)
    assert {e.total_bytes for e in events} == {made.bill.written_bytes + finding}
    assert done[-1] == events[-1].total_bytes
    assert told[-1].done_bytes <= finding


def test_progress_of_a_run_that_is_done_is_whole(folder, tmp_path):
    made, events = plan(MATCH, folder), []
    run_plan(made, tmp_path)
    run_plan(made, tmp_path, on_progress=events.append)
    assert events[-1].done_bytes == events[-1].total_bytes


def test_the_libraries_that_find_are_part_of_record_and_identity(folder, monkeypatch):
    made = plan(MATCH, folder)
    assert json.loads(manifest(made, **RECORD))["versions"].keys() == {"python", "scipy"}
    plain = plan("merge_method: passthrough\nmodels: [{model: a}]\n", folder)
    assert json.loads(manifest(plain, **RECORD))["versions"].keys() == {"python"}
    known = finishing.package_version
    other = {"scipy": "0.1"}
    monkeypatch.setattr(finishing, "package_version", lambda name: other.get(name) or known(name))
    assert plan(MATCH, folder).identity != made.identity
    monkeypatch.undo()
    assert plan(MATCH, folder).identity == made.identity
