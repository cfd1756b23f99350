"""Each key of a config that depends on layers follows them, or the stack is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from merge_kit.architecture.stacking import stacked_config
from merge_kit.architecture.stacks import Stack
from merge_kit.errors import PlanError

LAYERS = Stack("model.layers", 4, (0, 1, 2, 3))
DROP_1 = [0, 2, 3]
TWICE = [0, 1, 1, 2, 3]
REVERSED = [3, 2, 1, 0]


def stack(count: int) -> Stack:
    return Stack("model.layers", count, tuple(range(count)))


def stacked(config: dict[str, Any], layers: list[int], of: Stack = LAYERS) -> dict[str, Any]:
    """Return the parsed config of a stack of layers of one model."""
    text = json.dumps(config)
    found: dict[str, Any] = json.loads(stacked_config(text, of, [(text, i) for i in layers]))
    return found


def four(**keys: Any) -> dict[str, Any]:
    return {"model_type": "invented", "num_hidden_layers": 4, **keys}


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "depth"]
)
def test_the_count_is_patched_under_whatever_key(key):
    assert stacked({key: 4, "hidden_size": 4}, TWICE) == {key: 5, "hidden_size": 4}


def test_two_names_of_one_count_are_both_patched():
    config = {"n_layer": 4, "num_hidden_layers": 4}
    assert stacked(config, DROP_1) == {"n_layer": 3, "num_hidden_layers": 3}


def test_of_two_counts_the_one_of_the_stack_is_patched():
    config = {"num_hidden_layers": 8, "num_layers": 4}
    assert stacked(config, DROP_1) == {"num_hidden_layers": 8, "num_layers": 3}


def test_the_text_is_untouched_for_the_models_own_order():
    text = '{ "num_hidden_layers" :4,"max_window_layers":2, "x":[1,2,3,4]}\n'
    assert stacked_config(text, LAYERS, [(text, i) for i in range(4)]) == text


def test_only_what_must_change_changes():
    text = (
        '{\n  "eps": 1e-05,\n  "num_hidden_layers": 4,\n  "layer_types": ["a", "b", "c", "d"]\n}\n'
    )
    expected = '{\n  "eps": 1e-05,\n  "num_hidden_layers": 2,\n  "layer_types": ["d", "b"]\n}\n'
    assert stacked_config(text, LAYERS, [(text, 3), (text, 1)]) == expected


@pytest.mark.parametrize(
    ("key", "value", "layers", "expected"),
    [
        ("layer_types", ["a", "b", "c", "d"], TWICE, ["a", "b", "b", "c", "d"]),
        ("mlp_layer_types", ["d", "s", "s", "d"], REVERSED, ["d", "s", "s", "d"]),
        ("indexer_types", ["w", "x", "y", "z"], DROP_1, ["w", "y", "z"]),
        ("layer_rope_theta", [1.0, 2.0, 3.0, 4.0], DROP_1, [1.0, 3.0, 4.0]),
        ("intermediate_size", [10, 20, 30, 40], TWICE, [10, 20, 20, 30, 40]),
        ("activation_sparsity_pattern", [0.9, 0.9, 0, 0], DROP_1, [0.9, 0, 0]),
        ("num_attention_heads_per_layer", [4, 4, 8, 8], DROP_1, [4, 8, 8]),
        ("layers_block_type", ["m", "m", "a", "m"], DROP_1, ["m", "a", "m"]),
        ("attention_layers", ["g", "l", "g", "l"], DROP_1, ["g", "g", "l"]),
        ("block_configs", [{"x": 1}, {}, {"x": 2}, {}], DROP_1, [{"x": 1}, {"x": 2}, {}]),
        ("an_invented_key", [1, 2, 3, 4], DROP_1, [1, 3, 4]),
        ("no_rope_layers", [1, 1, 0, 1], TWICE, [1, 1, 1, 0, 1]),
        ("no_rope_layers", [1, 3], TWICE, [1, 2, 4]),
        ("moe_layers", [1, 3], TWICE, [1, 2, 4]),
        ("moe_layers", [0, 1, 2, 3], TWICE, [0, 1, 2, 3, 4]),
        ("mlp_only_layers", [0, 1], DROP_1, [0]),
        ("mlp_only_layers", [], TWICE, []),
        ("full_attn_idxs", [2], REVERSED, [1]),
        ("attn_layer_indices", [0, 3], REVERSED, [0, 3]),
        ("cross_attention_layers", [1], TWICE, [1, 2]),
        ("hybrid_layer_ids", [3], DROP_1, [2]),
        ("fullatt_block_indexes", [0, 2], DROP_1, [0, 1]),
        ("hybrid_override_pattern", "M-M*", TWICE, "M--M*"),
        ("per_layer_config", {"0": {"a": 1}, "1": {"a": 2}}, TWICE, None),
        ("pruned_heads", {"2": [1]}, DROP_1, {"1": [1]}),
        ("attention_types", [[["g", "l"], 2]], DROP_1, [[["g", "g", "l"], 1]]),
    ],
)
def test_what_is_per_layer_follows_the_layers(key, value, layers, expected):
    if expected is None:
        expected = {"0": {"a": 1}, "1": {"a": 2}, "2": {"a": 2}}
    assert stacked(four(**{key: value}), layers)[key] == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token_id", [1, 2, 3, 4]),
        ("suppress_tokens", [7, 8, 9, 10]),
        ("architectures", ["A", "B", "C", "D"]),
        ("image_mean", [0.1, 0.2, 0.3, 0.4]),
        ("rope_scaling", {"long_factor": [1, 2, 3, 4]}),
        ("rope_parameters", {"mrope_section": [1, 2, 3, 4]}),
        ("quantization_config", {"layers": [1, 2, 3]}),
        ("id2label", {"0": "a", "1": "b", "2": "c", "3": "d"}),
        ("vision_config", {"num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"]}),
        ("mtp_layer_types", ["a", "b", "c", "d"]),
    ],
)
def test_lists_of_that_length_that_are_not_per_layer_stay(key, value):
    assert stacked(four(**{key: value}), TWICE)[key] == value


def test_lists_within_an_object_of_another_name_follow():
    attention = {
        "kda_layers": [1, 2, 3],
        "full_attn_layers": [4],
        "heads": 2,
        "sizes": [1, 2, 3, 4],
    }
    found = stacked(four(linear_attn_config=attention), [0, 3, 3])["linear_attn_config"]
    assert found == attention | {"kda_layers": [1], "full_attn_layers": [2, 3]}


def test_lists_are_rebuilt_from_the_models_that_the_layers_come_from():
    a = json.dumps(four(layer_types=["a0", "a1", "a2", "a3"]))
    b = json.dumps({"num_hidden_layers": 2, "layer_types": ["b0", "b1"]})
    found = json.loads(stacked_config(a, LAYERS, [(a, 3), (b, 0), (b, 1)]))
    assert found == {**four(layer_types=["a3", "b0", "b1"]), "num_hidden_layers": 3}


def test_a_model_that_leaves_a_constant_list_out_has_the_constant():
    a, b = json.dumps(four(layer_types=["full"] * 4)), json.dumps(four())
    found = json.loads(stacked_config(a, LAYERS, [(a, 0), (b, 1), (b, 2)]))
    assert found["layer_types"] == ["full"] * 3
    assert "layer_types" not in json.loads(stacked_config(b, LAYERS, [(a, 0), (b, 1), (b, 2)]))


def test_a_model_that_leaves_a_mixed_list_out_is_refused():
    a, b = json.dumps(four(layer_types=["x", "y", "x", "y"])), json.dumps(four())
    with pytest.raises(PlanError, match=r"layer_types is missing .* output layer 1"):
        stacked_config(a, LAYERS, [(a, 0), (b, 1), (a, 2)])


def test_a_list_that_all_origins_have_is_added_to_a_donor_without_it():
    a, b = json.dumps(four()), json.dumps(four(layer_types=["x", "y", "x", "y"]))
    found = json.loads(stacked_config(a, LAYERS, [(b, 3), (b, 2), (b, 1)]))
    assert found["layer_types"] == ["y", "x", "y"]


def test_a_list_as_long_as_one_model_by_chance_is_left_alone():
    a = json.dumps(four(tags=["p", "q", "r", "s"]))
    b = json.dumps({"num_hidden_layers": 3, "tags": ["p", "q", "r", "s"]})
    found = json.loads(stacked_config(a, LAYERS, [(a, 0), (b, 2)]))
    assert found["tags"] == ["p", "q", "r", "s"]


def test_a_list_of_the_wrong_length_is_refused():
    with pytest.raises(PlanError, match="layer_types has 3 entries for 4 layers"):
        stacked(four(layer_types=["a", "b", "c"]), DROP_1)


WINDOW = {"use_sliding_window": True, "sliding_window": 8}
# What each key means, worked by hand. s: sliding, f: full; d: dense, e: experts; n: no rope.
KEPT_OR_ADJUSTED = [
    # layers 0..3 are f f s s; without layer 1 they are f s s
    ({"max_window_layers": 2, **WINDOW}, DROP_1, {"max_window_layers": 1}),
    # none slides; with five layers a threshold of 4 would let the last one slide
    ({"max_window_layers": 4, **WINDOW}, TWICE, {"max_window_layers": 5}),
    ({"max_window_layers": 2, **WINDOW}, [0, 1, 2, 3, 3], {"max_window_layers": 2}),
    # d e e e -> d d e e e
    ({"first_k_dense_replace": 1}, [0, 0, 1, 2, 3], {"first_k_dense_replace": 2}),
    # 2 dense, then every second: d d e d -> d d e
    ({"first_k_dense_replace": 2, "moe_layer_freq": 2}, [0, 1, 2], {"first_k_dense_replace": 2}),
    # d d e d -> e, by a first of 0
    ({"first_k_dense_replace": 2, "moe_layer_freq": 2}, [2], {"first_k_dense_replace": 0}),
    ({"num_dense_layers": 2}, DROP_1, {"num_dense_layers": 1}),
    ({"num_dense_layers": 2}, [2, 3], {"num_dense_layers": 0}),
    # d e d e -> e e: every layer
    ({"decoder_sparse_step": 2}, [1, 3], {"decoder_sparse_step": 1}),
    ({"decoder_sparse_step": 1}, TWICE, {"decoder_sparse_step": 1}),
    ({"decoder_sparse_step": 2}, [0, 1, 0, 1, 2, 3], {"decoder_sparse_step": 2}),
    # attention at 1 and 3 of 4: m a m a -> a m a
    (
        {"attn_layer_period": 2, "attn_layer_offset": 1},
        [1, 2, 3],
        {"attn_layer_period": 2, "attn_layer_offset": 0},
    ),
    # -> a a: each layer, period 1
    (
        {"attn_layer_period": 2, "attn_layer_offset": 1},
        [1, 3],
        {"attn_layer_period": 1, "attn_layer_offset": 0},
    ),
    (
        {"expert_layer_period": 2, "expert_layer_offset": 0},
        [1, 2, 3],
        {"expert_layer_period": 2, "expert_layer_offset": 1},
    ),
    # every second without rope: r n r n -> r r n
    ({"no_rope_layer_interval": 2}, [0, 2, 3], {"no_rope_layer_interval": 3}),
    ({"interleave_moe_layer_step": 2}, [1], {"interleave_moe_layer_step": 1}),
    ({"full_attention_interval": 4}, [0, 1, 3], {"full_attention_interval": 3}),
    # s s s f -> s s s s: a period longer than the stack
    ({"sliding_window_pattern": 4}, [0, 1, 2, 0, 1], {"sliding_window_pattern": 6}),
    ({"_sliding_window_pattern": 4}, [0, 3, 1, 3], {"_sliding_window_pattern": 2}),
    # L G by letters, the last layer never slides: s f s f -> s s f, and s f s -> s f s f f
    ({"sliding_window_pattern": "LG"}, [0, 2, 3], {"sliding_window_pattern": "L"}),
    ({"sliding_window_pattern": "LG"}, [0, 1, 2, 3, 3], {"sliding_window_pattern": "LG"}),
    ({"sliding_window_pattern": "LG"}, [0, 2, 1, 3], {"sliding_window_pattern": "LLG"}),
    ({"sliding_window_pattern": "LG"}, [0, 1, 0, 1, 2, 3], {"sliding_window_pattern": "LG"}),
    # experts in layers 1 and 2: d e e d -> e e d
    (
        {"moe_layer_start_index": 1, "moe_layer_end_index": 2, "moe_layer_interval": 1},
        [1, 2, 3],
        {"moe_layer_start_index": 0, "moe_layer_end_index": 1, "moe_layer_interval": 1},
    ),
    # -1 is the last layer: d e e e -> d e e
    (
        {"moe_layer_start_index": 1, "moe_layer_end_index": -1},
        DROP_1,
        {"moe_layer_start_index": 1, "moe_layer_end_index": -1},
    ),
    # without the end it would be d e e d e
    (
        {"moe_layer_start_index": 1, "moe_layer_end_index": 3},
        TWICE,
        {"moe_layer_start_index": 1, "moe_layer_end_index": -1},
    ),
    # the last two share keys and values of layers 0 (x) and 1 (y); layer 3 is left out
    (
        {"num_kv_shared_layers": 2, "layer_types": ["x", "y", "x", "y"]},
        [0, 1, 2],
        {"num_kv_shared_layers": 1},
    ),
    ({"num_kv_shared_layers": 0}, REVERSED, {"num_kv_shared_layers": 0}),
    ({"scale_attn_by_inverse_layer_idx": False}, TWICE, {"scale_attn_by_inverse_layer_idx": False}),
]


@pytest.mark.parametrize(("keys", "layers", "expected"), KEPT_OR_ADJUSTED)
def test_a_number_is_kept_or_adjusted_so_that_each_layer_keeps_its_meaning(keys, layers, expected):
    found = stacked(four(**keys), layers)
    assert found.items() >= expected.items()
    assert found.keys() == four(**keys).keys()


REFUSED = [
    ({"max_window_layers": 2, **WINDOW}, [2, 0], 0),
    ({"first_k_dense_replace": 1}, [0, 1, 0], 2),
    ({"num_dense_layers": 2}, [0, 2, 1], 1),
    ({"decoder_sparse_step": 2}, [0, 1, 1], 2),
    # a step of 3 is layer 2 for some readers, layer 1 for others: neither may change
    ({"decoder_sparse_step": 3}, [2, 2, 2], 0),
    ({"encoder_sparse_step": 2}, [1, 0], 0),
    ({"attn_layer_period": 2, "attn_layer_offset": 1}, [1, 1, 0], 0),
    ({"expert_layer_period": 2, "expert_layer_offset": 1}, [0, 1, 1], 2),
    ({"no_rope_layer_interval": 2}, [0, 1, 0, 0], 3),
    ({"interleave_moe_layer_step": 2}, [1, 0], 0),
    ({"full_attention_interval": 2}, [1, 0], 0),
    ({"global_attn_every_n_layers": 3}, [2, 0, 1], 0),
    ({"cross_layer_interval": 2}, [1, 0], 0),
    ({"sliding_window_pattern": 2}, [1, 0], 0),
    ({"moe_layer_start_index": 1, "moe_layer_end_index": 2}, [1, 0, 2, 2], 0),
    ({"moe_layer_start_index": [1, 2], "moe_layer_end_index": [3, 3]}, [2, 3], 0),
    ({"num_kv_shared_layers": 1}, [0, 3, 2], 1),
    # layer 3 reads from layer 2, which is left out
    ({"num_kv_shared_layers": 1}, [0, 1, 3], 2),
    ({"scale_attn_by_inverse_layer_idx": True}, [0, 1, 3], 0),
    ({"hidden_size_per_layer_input": 8}, [0, 1, 2], 0),
]


@pytest.mark.parametrize(("keys", "layers", "broken"), REFUSED)
def test_a_number_that_cannot_follow_is_refused_with_its_first_layer(keys, layers, broken):
    with pytest.raises(PlanError) as caught:
        stacked(four(**keys), layers)
    assert next(iter(keys)) in caught.value.problem
    assert f"output layer {broken} (layer {layers[broken]} of" in caught.value.problem
    assert caught.value.hint


@pytest.mark.parametrize(
    ("keys", "explicit"),
    [
        ({"max_window_layers": 2, **WINDOW}, {"layer_types": ["f", "f", "s", "s"]}),
        ({"sliding_window_pattern": 2}, {"layer_types": ["s", "f", "s", "f"]}),
        ({"first_k_dense_replace": 1}, {"mlp_layer_types": ["d", "e", "e", "e"]}),
        ({"no_rope_layer_interval": 2}, {"no_rope_layers": [1, 0, 1, 0]}),
        ({"interleave_moe_layer_step": 2}, {"moe_layers": [1, 3]}),
    ],
)
def test_a_list_that_says_it_layer_by_layer_frees_the_number(keys, explicit):
    found = stacked(four(**keys, **explicit), [1, 0, 3, 3])
    assert found.items() >= keys.items()


@pytest.mark.parametrize(
    "unused", [{"use_sliding_window": False, "sliding_window": 8}, {"sliding_window": None}]
)
def test_a_window_that_is_not_used_binds_no_layer(unused):
    found = stacked(four(max_window_layers=2, **unused), REVERSED)
    assert found["max_window_layers"] == 2


def test_an_empty_no_rope_list_is_none():
    with pytest.raises(PlanError, match="no_rope_layer_interval"):
        stacked(four(no_rope_layer_interval=2, no_rope_layers=[]), [1, 0])


def test_a_period_that_the_file_leaves_out_is_known_for_some_model_types():
    config = {"model_type": "gemma2", "num_hidden_layers": 4}
    with pytest.raises(PlanError, match=r"layer_types cannot follow .* output layer 0"):
        stacked(config, [1, 0])
    assert stacked(config, [0, 1, 0, 1, 2, 3])["num_hidden_layers"] == 6


@pytest.mark.parametrize(
    ("kind", "kept", "broken"),
    [
        ("gemma2", [0, 1, 2, 1, 2, 3], [0, 2]),  # s f s f; another period is read by no program
        ("gpt_oss", [2, 1, 0, 3], [0, 1, 1]),
        ("olmo3", [0, 1, 2, 3, 0, 1, 2, 3], [1, 3, 3]),
        ("cwm", [0, 1, 2, 3, 0, 2], [1, 2]),  # f s s s
    ],
)
def test_kinds_that_no_key_gives_keep_their_places(kind, kept, broken):
    config = {"model_type": kind, "num_hidden_layers": 4, "sliding_window": 8}
    found = stacked(config, kept)
    assert found == config | {"num_hidden_layers": len(kept)}
    with pytest.raises(PlanError, match="layer_types cannot follow"):
        stacked(config, broken)
    config["layer_types"] = ["a", "b", "c", "d"]
    assert stacked(config, broken)["layer_types"] == [config["layer_types"][i] for i in broken]


@pytest.mark.parametrize(
    ("listed", "counted"),
    [
        ({"model_type": "gemma2"}, {"model_type": "gemma2"}),
        ({"model_type": "gemma3_text"}, {"model_type": "gemma3_text"}),
        ({}, {"max_window_layers": 2}),
        ({"max_window_layers": 0}, {"max_window_layers": 2}),
    ],
)
def test_kinds_that_one_model_lists_and_another_counts_are_refused(listed, counted):
    one = json.dumps(four(layer_types=["full_attention"] * 4) | listed)
    other = json.dumps(four() | counted)
    for donor, source in ((one, other), (other, one)):
        with pytest.raises(PlanError, match="layer_types is written for some of the layers"):
            stacked_config(donor, LAYERS, [(donor, 0), (source, 1)])
    found = json.loads(stacked_config(other, LAYERS, [(one, 0), (one, 1)]))
    assert found["layer_types"] == ["full_attention"] * 2


def test_the_refusal_says_what_the_file_says_and_no_more():
    config = {"model_type": "cohere2", "num_hidden_layers": 4}
    with pytest.raises(PlanError, match=r"sliding_window_pattern .*the config says nothing"):
        stacked(config, [3, 1, 3])


def test_the_first_dense_layers_are_kept_for_programs_that_know_no_frequency_too():
    config = four(first_k_dense_replace=1, moe_layer_freq=1)
    assert stacked(config, [0, 2, 3, 1])["first_k_dense_replace"] == 1
    assert stacked(config, [0, 0, 2])["first_k_dense_replace"] == 2
    with pytest.raises(PlanError, match="first_k_dense_replace cannot follow"):
        stacked(config, [0, 0, 3, 0, 2])  # a frequency of two would say so, to some


def test_a_last_layer_that_programs_would_change_is_refused():
    kinds = ["sliding_attention", "full_attention"] * 2
    config = four(layer_types=kinds) | {"model_type": "gemma4_text"}
    assert stacked(config, [0, 3])["layer_types"] == ["sliding_attention", "full_attention"]
    with pytest.raises(PlanError, match=r"'sliding_attention' of the last layer \(layer 2 of its"):
        stacked(config, [0, 1, 2])


def test_numbers_of_another_model_bind_its_layers():
    a, b = json.dumps(four(num_dense_layers=1)), json.dumps(four(num_dense_layers=3))
    found = json.loads(stacked_config(a, LAYERS, [(a, 0), (b, 1), (b, 2), (a, 3)]))
    assert found["num_dense_layers"] == 3


def test_a_donor_without_the_key_cannot_take_a_layer_that_depends_on_it():
    a, b = json.dumps(four()), json.dumps(four(num_dense_layers=1))
    with pytest.raises(PlanError, match="num_dense_layers cannot follow"):
        stacked_config(a, LAYERS, [(a, 0), (b, 2)])


MTP = {"model_type": "deepseek_v3", "num_hidden_layers": 4, "num_nextn_predict_layers": 1}


def test_extra_layers_that_are_left_out_are_no_longer_counted():
    found = stacked(MTP, DROP_1, of=stack(5))
    assert (found["num_hidden_layers"], found["num_nextn_predict_layers"]) == (3, 0)


def test_extra_layers_at_the_end_are_kept_and_not_counted_as_layers():
    found = stacked(MTP, [0, 2, 3, 4], of=stack(5))
    assert (found["num_hidden_layers"], found["num_nextn_predict_layers"]) == (3, 1)


def test_a_list_that_covers_extra_layers_keeps_covering_them():
    found = stacked({**MTP, "layer_types": ["a", "b", "c", "d", "x"]}, [0, 2, 4], of=stack(5))
    assert found["layer_types"] == ["a", "c", "x"]


def test_an_extra_layer_before_ordinary_ones_is_refused():
    with pytest.raises(PlanError, match=r"num_nextn_predict_layers .* output layer 1"):
        stacked(MTP, [0, 4, 1], of=stack(5))


def test_extra_layers_stored_elsewhere_stay_counted():
    assert stacked(MTP, DROP_1)["num_nextn_predict_layers"] == 1


def test_a_layer_that_the_config_does_not_count_is_refused():
    with pytest.raises(PlanError, match=r"layer 4 of model.layers"):
        stacked(four(), [0, 4], of=stack(5))


def test_a_config_without_a_count_is_refused():
    with pytest.raises(PlanError, match=r"no layer count for model.layers"):
        stacked({"architecture": "vit_tiny"}, DROP_1)


def test_a_config_without_a_count_serves_layers_in_their_own_order():
    a, b = '{"architecture": "vit_tiny"}', "{}"
    origins = [(a, 0), (b, 1), (a, 2), (b, 3)]
    assert stacked_config(a, LAYERS, origins) == a


def test_a_model_without_a_config_can_give_layers_where_all_are_alike():
    a = json.dumps(four(layer_types=["full"] * 4))
    found = json.loads(stacked_config(a, LAYERS, [(a, 0), ("{}", 5)]))
    assert found == {**four(layer_types=["full"] * 2), "num_hidden_layers": 2}


def test_layers_that_share_their_weights_are_refused():
    with pytest.raises(PlanError, match=r"counts 12 layers, model.layers holds 4"):
        stacked({"num_hidden_layers": 12}, DROP_1)


def test_only_the_section_of_the_stack_changes():
    config = {
        "model_type": "llava",
        "text_config": {"num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"]},
        "vision_config": {"num_hidden_layers": 4, "layer_types": ["e", "f", "g", "h"]},
    }
    text = stacked(config, [1, 2], of=Stack("language_model.model.layers", 4, (0, 1, 2, 3)))
    assert text["text_config"] == {"num_hidden_layers": 2, "layer_types": ["b", "c"]}
    assert text["vision_config"] == config["vision_config"]
    vision = stacked(config, [1, 2], of=Stack("vision_tower.encoder.layers", 4, (0, 1, 2, 3)))
    assert vision["text_config"] == config["text_config"]
    assert vision["vision_config"] == {"num_hidden_layers": 2, "layer_types": ["f", "g"]}


def test_a_copy_of_the_text_config_at_the_top_follows_too():
    text = {"num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"]}
    found = stacked({"model_type": "qwen2_5_vl", **text, "text_config": text}, [1, 2])
    cut = {"num_hidden_layers": 2, "layer_types": ["b", "c"]}
    assert found == {"model_type": "qwen2_5_vl", **cut, "text_config": cut}


def test_a_text_config_that_leaves_its_count_out_gets_one():
    config = {
        "model_type": "llava",
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", "num_hidden_layers": 4},
    }
    found = stacked(config, DROP_1, of=Stack("language_model.model.layers", 4, (0, 1, 2, 3)))
    assert found["text_config"] == {"model_type": "llama", "num_hidden_layers": 3}
    assert found["vision_config"] == config["vision_config"]


ENCODER = Stack("encoder.block", 4, (0, 1, 2, 3))
DECODER = Stack("decoder.block", 4, (0, 1, 2, 3))
T5 = {"model_type": "t5", "is_encoder_decoder": True, "num_layers": 4}


@pytest.mark.parametrize(
    ("of", "extra", "expected"),
    [
        (ENCODER, {"num_decoder_layers": 4}, (3, 4)),
        (DECODER, {"num_decoder_layers": 4}, (4, 3)),
        (ENCODER, {}, (3, 4)),
        (DECODER, {}, (4, 3)),
        (DECODER, {"num_decoder_layers": None}, (4, 3)),
    ],
)
def test_encoder_and_decoder_are_counted_apart(of, extra, expected):
    found = stacked({**T5, **extra}, DROP_1, of=of)
    assert (found["num_layers"], found["num_decoder_layers"]) == expected


def test_a_second_name_of_the_encoders_count_follows_the_encoder_alone():
    config = {"encoder_layers": 4, "decoder_layers": 4, "num_hidden_layers": 4}
    found = stacked(config, DROP_1, of=Stack("model.encoder.layers", 4, (0, 1, 2, 3)))
    assert found == {"encoder_layers": 3, "decoder_layers": 4, "num_hidden_layers": 3}
    found = stacked(config, DROP_1, of=Stack("model.decoder.layers", 4, (0, 1, 2, 3)))
    assert found == {"encoder_layers": 4, "decoder_layers": 3, "num_hidden_layers": 4}


@pytest.mark.parametrize("junk", ["x", None, -1, 0, True, [1, "x"], {"a": 1}, 1.5, 10**30])
@pytest.mark.parametrize(
    "key", sorted({key for keys, *_ in [*KEPT_OR_ADJUSTED, *REFUSED] for key in keys})
)
def test_a_value_of_the_wrong_type_never_ends_in_a_traceback(key, junk):
    try:
        assert stacked(four(**{key: junk}), DROP_1)["num_hidden_layers"] == 3
    except PlanError as exc:
        assert exc.problem  # noqa: PT017  (either answer will do, an exception of another kind not)
