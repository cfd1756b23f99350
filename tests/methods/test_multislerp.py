"""multislerp: worked by hand, against the construction it shortens, and without a direction."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
import torch

from merge_kit.errors import ParameterError
from merge_kit.methods.base import PerModel
from merge_kit.methods.multislerp import MultiSlerp
from tests.methods.vectors import KINDS, exact, length, merged, numbers, within_law_4


def make(*weights, **more):
    return MultiSlerp(weight=PerModel(weights), **more)


def terms(models, weights, base=None, *, normalize=True):
    """Return the terms of the result, after the whole construction in the tangent space."""
    vectors = models if base is None else [x - base for x in models]
    total = sum(weights) if normalize else 1
    weights = [np.longdouble(w) / total for w in weights]
    lengths = [length(x) for x in vectors]
    units = [x / r for x, r in zip(vectors, lengths, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    point = mean / length(mean)
    tangent = sum(w * (u - np.sum(u * point) * point) for w, u in zip(weights, units, strict=True))
    step = length(tangent)  # of rounding only
    point = np.cos(step) * point + (np.sin(step) / step * tangent if step else 0)
    scale = sum(w * r for w, r in zip(weights, lengths, strict=True))
    parts = [scale * w / length(mean) * u for w, u in zip(weights, units, strict=True)]
    np.testing.assert_allclose(sum(parts), scale * point, rtol=1e-12, atol=1e-13 * abs(scale))
    return parts if base is None else [base, *parts]


def test_lengths_and_directions_are_averaged_apart(tmp_path):
    # directions (1, 0) and (0, 1) with weights 3/4 and 1/4; length 3/4 * 2 + 1/4 * 6 = 3
    result = merged(make(3.0, 1.0), [[2.0, 0.0], [0.0, 6.0]], None, tmp_path)
    assert result.tolist() == pytest.approx([3 * 3 / sqrt(10), 3 / sqrt(10)])


def test_with_a_base_task_vectors_are(tmp_path):
    result = merged(make(1.0, 1.0), [[12.0, 5.0], [10.0, 11.0]], [10.0, 5.0], tmp_path)
    assert result.tolist() == pytest.approx([10 + 4 / sqrt(2), 5 + 4 / sqrt(2)])


def test_weights_as_they_are(tmp_path):
    # m = (3, 1), length 3 * 2 + 1 * 6 = 12
    result = merged(
        make(3.0, 1.0, normalize_weights=False), [[2.0, 0.0], [0.0, 6.0]], None, tmp_path
    )
    assert result.tolist() == pytest.approx([12 * 3 / sqrt(10), 12 / sqrt(10)])


@pytest.mark.parametrize("has_base", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "normalize"), [(2, True), (3, False), (8, True)])
def test_against_the_construction(tmp_path, kind, count, normalize, has_base):
    base, *models = numbers(kind, count)
    base = base if has_base else None
    weights = [1.5 - 0.4 * i for i in range(count)]  # of eight some are negative
    method = make(*weights, normalize_weights=normalize)
    result = merged(method, models, base, tmp_path)
    ground = None if base is None else exact(base)
    parts = terms([exact(m) for m in models], weights, ground, normalize=normalize)
    within_law_4(method, result, parts)


@pytest.mark.parametrize("apart", [1e-2, 3e-5, 1e-7])
def test_nearly_opposite_models_keep_law_4(tmp_path, apart):
    one, side = (x.double() for x in numbers("independent", 1))
    models = [one, -one + apart * side]
    result = merged(make(1.0, 1.0), models, None, tmp_path)
    within_law_4(make(1.0, 1.0), result, terms([exact(m) for m in models], [1, 1]))


@pytest.mark.parametrize("weight", [1.0, 0.25, -3.0, 0.0])
def test_one_model_is_itself_whatever_its_weight(tmp_path, weight):
    assert make(weight).copies()
    assert not make(1.0, 1.0).copies()
    assert merged(make(weight), [[3.0, 1.0]], [1.0, 1.0], tmp_path).tolist() == [3.0, 1.0]


@pytest.mark.parametrize(
    ("models", "weights", "wanted"),
    [
        ([[3.0, 0.0], [-1.0, 0.0]], [1.0, 1.0], [1.0, 0.0]),
        ([[3.0, 0.0], [-1.0, 0.0], [0.0, 0.0]], [1.0, 1.0, 2.0], [0.5, 0.0]),
        ([[0.0, 0.0], [0.0, 0.0]], [1.0, 1.0], [0.0, 0.0]),
        ([[0.0, 0.0], [4.0, 0.0]], [1.0, 1.0], [2.0, 0.0]),
        ([[2.0, 0.0], [-2.0, 0.0]], [3.0, 1.0], [2.0, 0.0]),  # direction of the heavier
        ([[1e-9, 0.0], [0.0, 1e-9]], [1.0, 1.0], [1e-9 / sqrt(2)] * 2),
    ],
)
def test_short_vectors_and_balanced_ones(tmp_path, models, weights, wanted):
    result = merged(make(*weights), models, None, tmp_path)
    assert result.tolist() == pytest.approx(wanted, rel=1e-6, abs=0)


def test_eps_is_the_length_that_the_mean_direction_must_exceed(tmp_path):
    models = [[1.0, 0.0], [-1.0, 0.5]]
    cosine = -1 / sqrt(1.25)
    mean = sqrt((1 + cosine) / 2)  # |m| of two unit vectors, 0.23
    below = merged(make(1.0, 1.0, eps=mean * 1.01), models, None, tmp_path / "a")
    assert below.tolist() == [0.0, 0.25]  # their mean
    above = merged(make(1.0, 1.0, eps=mean * 0.99), models, None, tmp_path / "b")
    assert float(above.norm()) == pytest.approx((1 + sqrt(1.25)) / 2)


def test_weights_of_zero_that_are_not_normalised_give_the_base(tmp_path):
    method = make(0.0, 0.0, normalize_weights=False)
    assert merged(method, [[3.0, 0.0], [1.0, 2.0]], [1.0, 1.0], tmp_path).tolist() == [1.0, 1.0]


def test_squares_beyond_float64_give_the_weighted_mean(tmp_path):
    models = [torch.tensor([x, 3.0], dtype=torch.float64) for x in (1e200, 3e200)]
    result = merged(make(1.0, 3.0), models, None, tmp_path)
    assert result.tolist() == pytest.approx([2.5e200, 3.0])


@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.0, 0.0), (1.0, -0.9999999)])
def test_weights_that_cancel_cannot_be_normalised(weights):
    with pytest.raises(ParameterError, match="normalising would divide by it") as caught:
        make(*weights)
    assert "normalize_weights: false" in caught.value.hint
    assert make(*weights, normalize_weights=False).weight == weights


@pytest.mark.parametrize("eps", [-1e-9, float("nan")])
def test_eps_out_of_range(eps):
    with pytest.raises(ParameterError, match="expected a number from 0"):
        make(1.0, 1.0, eps=eps)


def test_models_in_another_order_give_the_same(tmp_path):
    base, *models = numbers("fine-tunes", 4)
    one = merged(make(1.0, 2.0, 3.0, 4.0), models, base, tmp_path / "a")
    other = merged(make(4.0, 3.0, 2.0, 1.0), models[::-1], base, tmp_path / "b")
    torch.testing.assert_close(one, other, rtol=2.0**-20, atol=2.0**-24)
