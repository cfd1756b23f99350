"""A filter that is in no tensor's name is said, once, with the nearest name of a module."""

from __future__ import annotations

import adapters_by_hand as hand
import pytest

from tests.toys import family, plan

ONE = "merge_method: passthrough\nslices:\n  - sources:\n      - model: ONE\n"
ONE += "        layer_range: [0, 5]\n"


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    return family(tmp_path_factory.mktemp("toys"))


def said(text: str, folder) -> list[str]:
    return [note for note in plan(text, folder).notes if "has a filter" in note]


def test_a_misspelt_filter_is_noted_with_place_and_nearest_module(toys):
    text = ONE + "        parameters: {scale: [{filter: q_porj, value: 0.5}, {value: 2}]}\n"
    (note,) = said(text, toys)
    assert note == (
        "<recipe>:6:29: scale has a filter 'q_porj' that is in no tensor's name here, and has no "
        "effect; did you mean 'q_proj'?"
    )


def test_filters_of_several_parts_are_compared_part_by_part(toys):
    text = ONE + "        parameters: {scale: [{filter: self_atn.q_proj, value: 0.5}]}\n"
    assert said(text, toys)[0].endswith("did you mean 'self_attn.q_proj'?")


def test_what_is_like_no_module_has_no_suggestion(toys):
    text = ONE + "        parameters: {scale: [{filter: layers.40., value: 0.5}]}\n"
    assert said(text, toys)[0].endswith("and has no effect")


@pytest.mark.parametrize("part", ["q_proj", "layers.4.", "'*'", "", "odel.la", "embed"])
def test_filters_that_match_are_not_spoken_of(toys, part):
    text = ONE + f"        parameters: {{scale: [{{filter: {part}, value: 0.5}}]}}\n"
    assert said(text, toys) == []


def test_each_level_is_held_to_what_it_decides_on(toys):
    text = """\
merge_method: linear
parameters: {weight: [{filter: layers.4., value: 1}, {filter: layers.5., value: 1}, {value: 1}]}
slices:
  - sources: [{model: ONE, layer_range: [0, 2]}]
    parameters: {weight: [{filter: norm, value: 1}, {filter: layers.4., value: 1}, {value: 1}]}
  - sources:
      - {model: ONE, layer_range: [2, 5], parameters: {weight: {filter: lm_had, value: 2}}}
"""
    notes = said(text, toys)
    assert [note.split(":")[1] for note in notes] == ["2", "5", "7"]
    assert "'layers.5.'" in notes[0]
    assert "'layers.4.'" in notes[1]
    assert "'lm_had'" in notes[2]
    assert notes[2].endswith("did you mean 'lm_head'?")


def test_stages_are_held_to_their_own_tensors(toys):
    text = """\
name: one
merge_method: linear
parameters: {weight: [{filter: gate, value: 1}, {value: 1}]}
models: [{model: ONE}, {model: K}]
---
merge_method: passthrough
models: [{model: one, parameters: {scale: [{filter: mlp, value: 2}, {filter: gate, value: 1}]}}]
"""
    assert [note.split(":")[1] for note in said(text, toys)] == ["3", "7"]


def test_a_filter_that_a_narrower_level_hides_is_no_wrong_one(toys):
    text = """\
merge_method: linear
parameters: {weight: [{filter: mlp, value: 1}]}
models:
  - {model: ONE, parameters: {weight: 1}}
  - {model: K, parameters: {weight: 1}}
"""
    assert said(text, toys) == []


def test_the_share_of_a_seam_is_held_to_the_summed_layers(toys):
    text = """\
merge_method: depth_upscale
models: [{model: ONE}]
parameters: {overlap: 2, overlap_mode: sum, t: [{filter: mpl, value: 1}, {filter: q_, value: 0}]}
"""
    notes = said(text, toys)
    assert len(notes) == 1
    assert "t has a filter 'mpl'" in notes[0]
    assert "did you mean 'mlp'?" in notes[0]


def test_adapters_are_held_to_the_modules_that_they_change(tmp_path):
    for name in "xy":
        hand.adapter(tmp_path / name, hand.ON_Q)
    text = """\
merge_method: lora_linear
parameters: {weight: [{filter: q_porj, value: 1}, {value: 1}]}
models: [{model: x}, {model: y}]
"""
    notes = said(text, tmp_path)
    assert len(notes) == 1
    assert "did you mean 'q_proj'?" in notes[0]


def test_an_extraction_is_held_to_every_tensor_of_the_models(tmp_path):
    text = """\
merge_method: lora_extract
base_model: base
parameters: {rank: [{filter: q_porj, value: 1}, {filter: up_proj, value: 2}, {value: 1}]}
models: [{model: tuned}]
"""
    hand.base(tmp_path / "base")
    hand.base(tmp_path / "tuned", tensors={hand.UP.format(0) + ".weight": hand.numbers(5, 3)})
    notes = said(text, tmp_path)
    assert len(notes) == 1
    assert "'q_porj'" in notes[0]
