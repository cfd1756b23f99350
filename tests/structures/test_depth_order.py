"""Which layers a deeper model takes, in whole numbers."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from merge_kit.errors import ParameterError
from merge_kit.methods.depth_upscale import DepthUpscale
from merge_kit.plan.building.depth_order import Order, overlapping, places_of_copies

DEPTHS = st.integers(1, 90)


def order(below: int, above: int, **parameters) -> Order:
    return overlapping(DepthUpscale(**parameters), below, above)


def test_solar_takes_the_first_24_and_the_last_24_of_32_layers():
    assert order(32, 32, target_layers=48) == order(32, 32, overlap=8) == Order(24, 0, 24)


def test_the_textbook_sums_16_pairs_of_32_layers():
    wanted = Order(16, 16, 16)
    assert order(32, 32, target_layers=48, overlap_mode="sum") == wanted
    assert order(32, 32, overlap=16, overlap_mode="sum") == wanted


def test_of_an_odd_number_left_out_the_lower_copy_loses_one_less():
    assert order(32, 32, target_layers=47) == Order(24, 0, 23)
    assert order(4, 4, target_layers=5) == Order(3, 0, 2)
    assert order(5, 4, target_layers=6) == Order(4, 0, 2)


def test_models_of_different_depth_lose_the_same_number():
    assert order(6, 4, overlap=1) == Order(5, 0, 3)
    assert order(6, 4, overlap=3, overlap_mode="sum") == Order(3, 3, 1)
    assert order(4, 6, overlap=0) == Order(4, 0, 6)


def test_one_layer_can_only_be_doubled():
    assert order(1, 1, target_layers=2) == order(1, 1, overlap=0) == Order(1, 0, 1)


@given(DEPTHS, DEPTHS, st.data())
def test_a_target_that_is_allowed_is_met_and_both_copies_are_whole_ranges(below, above, data):
    deepest, most = max(below, above), below + above
    target = data.draw(st.integers(deepest + 1, most))
    for mode in ("drop", "sum"):
        found = order(below, above, target_layers=target, overlap_mode=mode)
        assert found.layers == target
        assert 0 < found.lower <= below
        assert 0 < found.upper <= above
        if mode == "sum":
            assert found.lower + found.pairs == below
            assert found.upper + found.pairs == above
        else:
            assert found.pairs == 0
            assert 0 <= (above - found.upper) - (below - found.lower) <= 1


@given(DEPTHS, DEPTHS, st.integers(0, 90), st.sampled_from(["drop", "sum"]))
def test_an_overlap_is_allowed_just_where_the_result_is_deeper(below, above, overlap, mode):
    result = below + above - overlap * (2 if mode == "drop" else 1)
    try:
        found = order(below, above, overlap=overlap, overlap_mode=mode)
    except ParameterError:
        assert result <= max(below, above)
    else:
        assert found.layers == result > max(below, above)


@given(DEPTHS, DEPTHS, st.integers(1, 300), st.sampled_from(["drop", "sum"]))
def test_other_targets_are_refused_with_the_range(below, above, target, mode):
    deepest, most = max(below, above), below + above
    assume(not deepest < target <= most)
    with pytest.raises(ParameterError) as caught:
        order(below, above, target_layers=target, overlap_mode=mode)
    assert f"target_layers is {target}, expected {deepest + 1} to {most}" in str(caught.value)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"overlap": 16}, "overlap is 16, expected 0 to 15: the model has 32 layers"),
        ({"overlap": 16}, "the result has 32 and would not be deeper"),
        ({"overlap": 40}, "expected 0 to 15: the model has 32 layers, the result has none"),
        ({"overlap": 32, "overlap_mode": "sum"}, "overlap is 32, expected 0 to 31"),
        ({"target_layers": 32}, "target_layers is 32, expected 33 to 64: the model has 32 layers"),
        ({"target_layers": 65}, "once more, in a document that names it"),
    ],
)
def test_what_is_out_of_range_is_told_with_the_range(parameters, says):
    with pytest.raises(ParameterError) as caught:
        order(32, 32, **parameters)
    assert says in str(caught.value)


def test_of_two_models_both_depths_are_told():
    with pytest.raises(ParameterError, match="the lower model has 6 layers, the upper 4"):
        order(6, 4, overlap=2)


def test_llama_pro_puts_8_blocks_after_each_4_of_32_layers():
    places = places_of_copies(DepthUpscale(target_layers=40, block_expansion=True), 32)
    assert places == (3, 7, 11, 15, 19, 23, 27, 31)


@pytest.mark.parametrize(
    ("target", "wanted"),
    [(6, (4,)), (7, (1, 4)), (8, (0, 2, 4)), (9, (0, 1, 2, 4)), (10, (0, 1, 2, 3, 4))],
)
def test_blocks_that_no_groups_of_one_size_fit_are_spread_over_5_layers(target, wanted):
    method = DepthUpscale(target_layers=target, block_expansion=True)
    assert places_of_copies(method, 5) == wanted


@given(st.integers(1, 130), st.data())
def test_copies_stand_after_layers_of_their_own_the_last_after_the_last(layers, data):
    added = data.draw(st.integers(1, layers))
    method = DepthUpscale(target_layers=layers + added, block_expansion=True)
    places = places_of_copies(method, layers)
    assert len(set(places)) == len(places) == added
    assert list(places) == sorted(places)
    assert places[0] >= 0
    assert places[-1] == layers - 1
    gaps = {b - a for a, b in zip((-1, *places), places, strict=False)}
    assert max(gaps) - min(gaps) <= 1


def test_blocks_are_at_most_as_many_as_layers():
    with pytest.raises(ParameterError, match="target_layers is 9, expected 5 to 8"):
        places_of_copies(DepthUpscale(target_layers=9, block_expansion=True), 4)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({}, "target_layers is missing, and so is overlap; expected one of them"),
        ({"target_layers": 6, "overlap": 1}, "overlap stands beside target_layers"),
        ({"overlap": -1}, "overlap is -1, expected a whole number from 0"),
        ({"target_layers": 0}, "target_layers is 0, expected a whole number from 1"),
        ({"overlap": 1, "t": 1.5}, "t is 1.5, expected a number in [0, 1]"),
        ({"overlap": 1, "t": float("nan")}, "t is nan, expected a number in [0, 1]"),
        ({"overlap": 1, "block_expansion": True}, "overlap means nothing with block_expansion"),
        ({"block_expansion": True}, "target_layers is missing"),
    ],
)
def test_parameters_that_do_not_go_together_are_refused(parameters, says):
    with pytest.raises(ParameterError) as caught:
        DepthUpscale(**parameters)
    assert says in str(caught.value)
