from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.errors import CheckpointError
from merge_kit.plan.values import PlanInput
from merge_kit.publish.manifest import FORMAT, FileRecord, manifest, read_manifest
from merge_kit.publish.recipes import recipe_hash

HASHES = {"layers.0.up": "0" * 32, "norm": "a" * 32}
VERSIONS = {"merge_kit": "0.1.0", "torch": "2.13", "cpu": "x86_64 AVX512"}


def text_of(plan, recipe, **changes):
    options = {"hashes": HASHES, "nonfinite": {}, "saturated": {}, "versions": VERSIONS}
    return manifest(plan, recipe_text=recipe, **options | changes)


def test_the_record_says_what_was_merged(make_plan, recipe):
    found = json.loads(text_of(make_plan(), recipe, nonfinite={"norm": 2}, saturated={"norm": 1}))
    assert found["format"] == FORMAT
    assert found["recipe_hash"] == recipe_hash(recipe)
    assert "base_model: input-1:base\n" in found["recipe"]
    assert (found["seed"], found["method"]) == (3, "task_arithmetic")
    assert found["versions"].keys() == {"merge_kit", "torch", "cpu", "python"}
    assert found["counts"] == {"merged": 1, "copied": 1, "dropped": 1}
    assert found["inputs"][1] == {
        "key": "input-2",
        "name": "code",
        "hub_id": "org/code",
        "revision": "abc123",
        "is_base": False,
        "files": [{"name": "model.safetensors", "nbytes": 1_500_000}],
    }
    assert found["files"] == [{"name": "model.safetensors", "nbytes": 116}]
    assert found["side_files"] == [
        {"name": "config.json", "nbytes": 3},
        {"name": "vocab", "nbytes": None},
    ]
    assert found["tensors"] == HASHES
    assert (found["nonfinite"], found["saturated"]) == ({"norm": 2}, {"norm": 1})


def test_the_record_knows_neither_place_nor_time_nor_user(make_plan, recipe):
    text, plan = text_of(make_plan(), recipe), make_plan()
    assert not any(word in text for word in ("alice", "/home", "/cache", "merged/out"))
    elsewhere = "/Users/bob/models/base"
    moved = replace(plan.inputs[0], text=elsewhere, root=Path(elsewhere))
    there = recipe.replace("/home/alice/models/base", elsewhere).replace("alice", "bob")
    assert text_of(replace(plan, inputs=(moved, plan.inputs[1])), there) == text


def test_what_was_written_is_read_back(make_plan, recipe, tmp_path):
    (tmp_path / "merge_kit.json").write_text(text_of(make_plan(), recipe))
    for path in (tmp_path, tmp_path / "merge_kit.json"):
        record = read_manifest(path)
        assert record.files == (FileRecord("model.safetensors", 116),)
        assert record.tensors == HASHES
        assert record.counts.dropped == 1
        assert record.inputs[0].is_base


@given(name=st.text(), revision=st.text())
def test_hostile_names_stay_names(make_plan, recipe, tmp_path_factory, name, revision):
    plan = make_plan()
    local = PlanInput(
        "input-1", name, "/home/alice/models/base", Path("/home/alice/models/base"), ()
    )
    hub = replace(plan.inputs[1], revision=revision)
    path = tmp_path_factory.mktemp("out") / "merge_kit.json"
    path.write_text(text_of(replace(plan, inputs=(local, hub)), recipe), encoding="utf-8")
    record = read_manifest(path)
    assert record.inputs[0].name.isprintable()
    assert record.inputs[1].revision == revision
    assert record.tensors == HASHES


def edit(**changes):
    return lambda record: record | changes


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (edit(format=2), "has format 2, expected 1"),
        (edit(format=True), "has format True"),
        (edit(format="1"), "has format '1'"),
        (edit(seed="3"), "seed: Input should be a valid integer"),
        (edit(extra=1), "extra: "),
        (edit(tensors={"norm": "A" * 32}), "the hash of 'norm' is"),
        (edit(tensors={"\x1b[2J": "a" * 32}), "cannot be printed"),
        (edit(tensors={"norm": 1}), "tensors.norm: Input should be a valid string"),
        (edit(files=[{"name": "../x", "nbytes": 1}]), "'../x' is not in the folder"),
        (edit(side_files=[{"name": "/etc/passwd", "nbytes": 1}]), "is not in the folder"),
        (edit(files=[{"name": "x"}]), "files.0.nbytes: Field required"),
        (edit(counts={"merged": 1, "copied": 1, "dropped": 1, "lost": 1}), "counts.lost"),
        (
            lambda record: {k: v for k, v in record.items() if k != "method"},
            "method: Field required",
        ),
        (lambda record: [record], "expected an object"),
    ],
)
def test_a_record_that_was_edited_is_refused(make_plan, recipe, tmp_path, change, problem):
    path = tmp_path / "merge_kit.json"
    path.write_text(json.dumps(change(json.loads(text_of(make_plan(), recipe)))))
    with pytest.raises(CheckpointError) as caught:
        read_manifest(path)
    assert problem in caught.value.problem
    assert caught.value.hint


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b'{"format": 1, "format": 1}', b"[" * 100_000])
def test_a_damaged_record_is_refused(tmp_path, raw):
    (tmp_path / "merge_kit.json").write_bytes(raw)
    with pytest.raises(CheckpointError):
        read_manifest(tmp_path)


def test_a_missing_record_is_an_error_with_a_hint(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no merge_kit\.json") as caught:
        read_manifest(tmp_path)
    assert "mergekit run" in caught.value.hint
