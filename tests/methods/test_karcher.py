"""karcher: worked by hand, against the iteration on whole vectors, and without a direction."""

from __future__ import annotations

from math import cos, pi, sin, sqrt

import numpy as np
import pytest
import torch

from merge_kit.errors import ParameterError
from merge_kit.methods.base import PerModel
from merge_kit.methods.karcher import Karcher
from merge_kit.methods.slerp import Slerp
from tests.methods.vectors import KINDS, exact, length, merged, numbers, within_law_4


def terms(models, weights, max_iter=10, tol=1e-5):
    """Return the terms of the mean: the iteration as written, on vectors and their factors."""
    weights = [np.longdouble(w) / sum(weights) for w in weights]
    lengths = [length(x) for x in models]
    units = [x / r for x, r in zip(models, lengths, strict=True)]
    point = sum(w * u for w, u in zip(weights, units, strict=True))
    factors = [w / length(point) for w in weights]
    point = point / length(point)
    for _ in range(max_iter):
        cosines = [np.clip(np.sum(point * u), -1, 1) for u in units]
        angles = [np.arccos(c) for c in cosines]
        pulls = [w * (a / np.sin(a) if a else 1) for w, a in zip(weights, angles, strict=True)]
        tangent = sum(p * (u - c * point) for p, u, c in zip(pulls, units, cosines, strict=True))
        step = length(tangent)
        if step < tol:
            break
        back = sum(p * c for p, c in zip(pulls, cosines, strict=True))
        point = np.cos(step) * point + np.sin(step) / step * tangent
        factors = [
            np.cos(step) * f + np.sin(step) / step * (p - back * f)
            for f, p in zip(factors, pulls, strict=True)
        ]
    scale = sum(w * r for w, r in zip(weights, lengths, strict=True))
    parts = [scale * f * u for f, u in zip(factors, units, strict=True)]
    np.testing.assert_allclose(sum(parts), scale * point, atol=1e-12 * float(scale), rtol=0)
    return parts


def circle(*degrees):
    return [[cos(d * pi / 180), sin(d * pi / 180)] for d in degrees]


def test_three_points_of_an_arc_have_their_mean_angle(tmp_path):
    # on a circle the mean is that of the angles: 0, 30 and 90 degrees give 40
    result = merged(Karcher(), circle(0, 30, 90), None, tmp_path)
    assert result.tolist() == pytest.approx(circle(40)[0], rel=2e-5)
    start = merged(Karcher(max_iter=0), circle(0, 30, 90), None, tmp_path / "b")
    x, y = 1 + sqrt(3) / 2, 0.5 + 1  # the sum of the three
    assert start.tolist() == pytest.approx([x / sqrt(x * x + y * y), y / sqrt(x * x + y * y)])


def test_weights_divide_an_arc(tmp_path):
    result = merged(Karcher(weight=PerModel((3.0, 1.0))), circle(0, 60), None, tmp_path)
    assert result.tolist() == pytest.approx(circle(15)[0], rel=2e-5)


def test_the_length_is_the_mean_length(tmp_path):
    result = merged(Karcher(), [[2.0, 0.0], [0.0, 6.0]], None, tmp_path)
    assert result.tolist() == pytest.approx([4 / sqrt(2), 4 / sqrt(2)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 3, 8])
def test_against_the_iteration(tmp_path, kind, count):
    _, *models = numbers(kind, count)
    weights = [0.5 + i for i in range(count)]
    method = Karcher(weight=PerModel(weights))
    result = merged(method, models, None, tmp_path)
    within_law_4(method, result, terms([exact(m) for m in models], weights))


@pytest.mark.parametrize("apart", [1e-2, 3e-5])
def test_nearly_opposite_models_keep_law_4(tmp_path, apart):
    one, side = numbers("independent", 1)
    models = [one, -one + apart * side]
    result = merged(Karcher(), models, None, tmp_path)
    within_law_4(Karcher(), result, terms([exact(m) for m in models], [1, 1]))


def test_two_models_of_one_length_as_slerp(tmp_path):
    one, other = numbers("independent", 1)
    other = other * float(one.double().norm() / other.double().norm())
    mean = merged(Karcher(weight=PerModel((2.0, 1.0)), tol=1e-12), [one, other], None, tmp_path)
    arc = merged(Slerp(t=1 / 3), [other], one, tmp_path / "b")
    torch.testing.assert_close(mean, arc, rtol=0, atol=1e-6)


def test_a_base_is_none_of_the_points(tmp_path):
    base, *models = numbers("independent", 3)
    without = merged(Karcher(), models, None, tmp_path / "a")
    assert torch.equal(merged(Karcher(), models, base, tmp_path / "b"), without)


def test_one_model_is_itself(tmp_path):
    _, model = numbers("mixed sizes", 1)
    assert torch.equal(merged(Karcher(weight=PerModel((0.3,))), [model], None, tmp_path), model)


@pytest.mark.parametrize(
    ("models", "wanted"),
    [
        ([[3.0, 0.0], [-1.0, 0.0]], [1.0, 0.0]),  # opposite: the mean
        ([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]),
        ([[0.0, 0.0], [4.0, 0.0]], [2.0, 0.0]),  # half the length, the one direction
        ([[1.0, 1.0], [3.0, 3.0]], [2.0, 2.0]),
        ([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], [1.0, 0.0]),  # one opposite does not pull
    ],
)
def test_without_a_direction_of_its_own(tmp_path, models, wanted):
    assert merged(Karcher(), models, None, tmp_path / "a").tolist() == pytest.approx(wanted)
    assert merged(Karcher(), models[::-1], None, tmp_path / "b").tolist() == pytest.approx(wanted)


def test_equal_angles_around_a_circle_balance(tmp_path):
    result = merged(Karcher(), circle(0, 120, 240), None, tmp_path)
    assert result.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("sizes", [(1e-30, 1e18), (1e18, 1e-30), (1e-38, 1e-38)])
def test_lengths_of_all_sizes_count(tmp_path, sizes):
    models = [[sizes[0], 0.0], [0.0, sizes[1]]]
    result = merged(Karcher(), models, None, tmp_path)
    each = sum(sizes) / 2 / sqrt(2)
    assert result.tolist() == pytest.approx([each, each], rel=1e-6)


def test_squares_beyond_float64_give_the_mean(tmp_path):
    models = [torch.tensor([x, 3.0], dtype=torch.float64) for x in (1e200, 3e200)]
    assert merged(Karcher(), models, None, tmp_path).tolist() == pytest.approx([2e200, 3.0])


def test_models_in_another_order_give_the_same(tmp_path):
    _, *models = numbers("fine-tunes", 4)
    one = merged(Karcher(), models, None, tmp_path / "a")
    other = merged(Karcher(), models[::-1], None, tmp_path / "b")
    torch.testing.assert_close(one, other, rtol=2.0**-20, atol=2.0**-24)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"weight": PerModel((1.0, -0.5))}, "weight is -0.5, expected a number from 0"),
        ({"weight": PerModel((0.0, 0.0))}, "weight of every model is 0"),
        ({"max_iter": -1}, "max_iter is -1"),
        ({"tol": -1e-3}, "tol is -0.001"),
        ({"tol": float("nan")}, "tol is nan"),
    ],
)
def test_parameters_out_of_range(parameters, message):
    with pytest.raises(ParameterError, match=message):
        Karcher(**parameters)


def test_small_factors_of_a_mean_that_has_converged_are_exact(tmp_path):
    """Sparse models hardly overlap: most elements are one model's, times its factor."""
    models = [exact(x.double()) for x in numbers("sparse", 8, shape=(600,))[1:]]
    weights = (1.0, 0.05, 0.7, 0.3, 0.06, 0.5, 0.9, 0.1)
    method = Karcher(weight=PerModel(weights), max_iter=60, tol=0.0)
    result = merged(method, [torch.from_numpy(x.astype(float)) for x in models], None, tmp_path)
    wanted = terms(models, weights, max_iter=60, tol=0.0)
    error = np.abs(exact(result) - sum(wanted))
    assert np.all(error <= 1e-12 * sum(np.abs(term) for term in wanted))
