"""The twelve tricky examples of the recipe dialect, with the numbers that they give."""

from __future__ import annotations

import pytest

from merge_kit.errors import MergeKitError
from tests.toys import family, layers, merge, outside, plan, toy, value


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    return family(tmp_path_factory.mktemp("toys"))


def test_1_a_gradient_spans_the_layers_and_starts_outside_them(toys):
    result = merge(
        "{merge_method: passthrough, models: [{model: ONE, parameters: {scale: [2, 4, 8]}}]}", toys
    )
    assert layers(result) == [2, 3, 4, 6, 8]
    assert outside(result) == [2, 2, 2]


def test_2_one_layer_is_at_the_end_of_a_gradient(tmp_path):
    toy(tmp_path / "one", layers=1)
    toy(tmp_path / "two", layers=1)
    toy(tmp_path / "three", layers=1)
    result = merge(
        "{merge_method: passthrough, models: [{model: one, parameters: {scale: [2, 4, 8]}}]}",
        tmp_path,
    )
    assert layers(result) == [8]
    assert outside(result) == [2, 2, 2]
    source = "{{sources: [{{model: {}, layer_range: [0, 1]}}]}}".format
    slices = ", ".join(source(name) for name in ("one", "two", "three"))
    result = merge(
        f"{{merge_method: passthrough, slices: [{slices}], parameters: {{scale: [2, 9]}}}}",
        tmp_path,
    )
    assert layers(result) == [9, 9, 9]


def test_3_tensors_after_the_layers_come_from_the_last_slice(toys):
    result = merge(
        """
        merge_method: passthrough
        slices:
          - sources: [{model: IDX, layer_range: [0, 3], parameters: {scale: [1, 2, 3]}}]
          - sources: [{model: IDK, layer_range: [3, 5], parameters: {scale: [10, 20]}}]
        """,
        toys,
    )
    assert layers(result) == [1, 4, 9, 40_000, 100_000]
    assert outside(result) == [100, 2_000_000, 3_000_000]


def test_4_a_gradient_of_the_recipe_starts_anew_in_each_slice(toys):
    result = merge(
        """
        merge_method: linear
        parameters: {weight: [0, 10], normalize: false}
        slices:
          - sources: [{model: ONE, layer_range: [0, 2]}]
          - sources: [{model: ONE, layer_range: [2, 5]}]
        """,
        toys,
    )
    assert layers(result) == [0, 10, 0, 5, 10]
    assert outside(result)[1] == 0


def test_5_what_no_filter_matches_falls_through_to_the_next_level(toys):
    result = merge(
        """
        merge_method: linear
        parameters: {weight: [10, 30], normalize: false}
        models:
          - model: ONE
            parameters:
              weight:
                - {filter: self_attn, value: [0, 1]}
                - {filter: embed, value: 5}
        """,
        toys,
    )
    assert value(result["model.layers.1.self_attn.q_proj.weight"]) == 0.25
    assert value(result["model.layers.1.mlp.up_proj.weight"]) == 15
    assert outside(result)[:2] == [5, 10]


def test_6_a_models_parameter_sees_input_names_and_a_global_one_output_names(toys):
    result = merge(
        """
        merge_method: task_arithmetic
        base_model: ZERO
        parameters:
          weight: [{filter: layers.3., value: 10}, {value: 1}]
          lambda: [{filter: layers.0., value: 2}, {value: 1}]
        slices:
          - sources: [{model: ZERO, layer_range: [3, 5]}, {model: ONE, layer_range: [3, 5]}]
        """,
        toys,
    )
    assert layers(result) == [20, 1]


def test_7_the_narrowest_level_that_applies_wins(toys):
    result = merge(
        """
        merge_method: linear
        parameters: {weight: 7, normalize: true}
        slices:
          - parameters: {weight: [{filter: norm, value: 3}], normalize: false}
            sources:
              - model: ONE
                layer_range: [0, 5]
                parameters: {weight: [{filter: mlp, value: 2}]}
              - {model: K, layer_range: [0, 5]}
        """,
        toys,
    )
    assert value(result["model.layers.2.mlp.up_proj.weight"]) == 7002
    assert value(result["model.layers.2.input_layernorm.weight"]) == 3003
    assert outside(result)[0] == 7007


def test_8_an_unlisted_base_is_added_to_the_sum_and_said_so(toys):
    recipe = """
        merge_method: linear
        base_model: MM
        parameters: {weight: 1, normalize: false}
        models: [{model: ONE}, {model: K}]
        """
    result = merge(recipe, toys)
    assert set(layers(result) + outside(result)) == {1_001_001}
    assert any(
        "MM is not listed" in note and "weight 1" in note for note in plan(recipe, toys).notes
    )


def test_9_every_source_of_the_last_slice_counts_after_the_layers(toys):
    result = merge(
        """
        merge_method: linear
        parameters: {weight: 1, normalize: false}
        slices:
          - sources: [{model: ONE, layer_range: [0, 2]}]
          - sources: [{model: IDX, layer_range: [2, 4]}, {model: K, layer_range: [2, 4]}]
        """,
        toys,
    )
    assert layers(result) == [1, 1, 1003, 1004]
    assert outside(result) == [1, 1200, 1300]


def test_10_one_model_twice_in_a_slice_is_an_error(toys):
    with pytest.raises(MergeKitError, match="IDX"):
        merge(
            """
            merge_method: linear
            parameters: {normalize: false}
            slices:
              - sources:
                  - {model: IDX, layer_range: [0, 2], parameters: {weight: 1}}
                  - {model: IDX, layer_range: [2, 4], parameters: {weight: 10}}
            """,
            toys,
        )


def test_11_slerp_starts_at_the_base_wherever_it_is_listed(toys):
    result = merge(
        """
        merge_method: slerp
        base_model: K
        parameters: {t: 0.25}
        models: [{model: ONE}, {model: K}]
        """,
        toys,
    )
    assert set(layers(result) + outside(result)) == {750.25}


def test_12_normalise_then_lambda(toys):
    result = merge(
        """
        merge_method: task_arithmetic
        base_model: ZERO
        parameters: {normalize: true, lambda: 0.5}
        models:
          - {model: ONE, parameters: {weight: 1}}
          - {model: K, parameters: {weight: 3}}
        """,
        toys,
    )
    assert set(layers(result) + outside(result)) == {375.125}
