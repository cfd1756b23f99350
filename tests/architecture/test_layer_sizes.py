"""Which keys of a config give sizes, for all layers or for each one."""

from __future__ import annotations

import pytest

from merge_kit.architecture.layer_sizes import differing_keys, differing_settings, sizes_by_layer


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"intermediate_size": [8, 16, 8]}, True),
        ({"block_configs": [{"ffn": 2}, {}, {"ffn": 3}]}, True),
        ({"per_layer_config": {"1": {"heads": 2}}}, True),
        ({"linear_attn_config": {"num_heads_per_layer": [2, 4, 2]}}, True),
        ({"intermediate_size": 8}, False),
        ({"intermediate_size": [8, 16]}, False),  # not one for each of three layers
        ({"layer_types": ["full", "sliding", "full"]}, False),
        ({"no_rope_layers": [1, 0, 1]}, False),  # flags
        ({"vision_config": {"model_type": "v", "intermediate_size": [1, 2, 3]}}, False),
    ],
)
def test_sizes_by_layer_are_told_from_other_lists(config, expected):
    assert sizes_by_layer(config, 3) is expected


def test_the_keys_whose_numbers_are_the_axes_that_differ_are_named():
    one = {"hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 8, "vocab_size": 9}
    other = {"hidden_size": 6, "intermediate_size": 12, "num_hidden_layers": 12, "vocab_size": 9}
    assert differing_keys(one, other, (8, 4), (12, 6)) == ["hidden_size", "intermediate_size"]
    assert differing_keys(one, other, (8, 4), (8, 6)) == ["hidden_size"]
    assert differing_keys(one, {}, (8, 4), (12, 6)) == []


def test_settings_differ_only_where_both_give_one_value():
    keys = ("rope_theta", "sliding_window", "head_dim", "hidden_act")
    one = {"rope_theta": 1.0, "sliding_window": None, "head_dim": [4, 8], "hidden_act": "silu"}
    other = {"rope_theta": 2.0, "sliding_window": 8, "head_dim": 4, "hidden_act": "silu"}
    assert differing_settings(one, other, keys) == ["rope_theta"]
