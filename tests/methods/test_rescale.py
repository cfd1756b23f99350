"""rescale: worked by hand, against its equation, and tensors without a size."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
import torch

from merge_kit.core.tensors import BLOCK
from merge_kit.errors import NonFiniteError, ParameterError
from merge_kit.methods.base import PerModel
from merge_kit.methods.reductions import CHUNK, Done, Place
from merge_kit.methods.rescale import Rescale
from merge_kit.methods.spreads import Spreads
from tests.methods.vectors import KINDS, exact, length, merged, numbers, within_law_4


def make(*weights, **more):
    return Rescale(weight=PerModel(weights), **more)


def test_to_the_mean_length(tmp_path):
    # lengths 2 and 6: both become 4, then their mean
    result = merged(make(1.0, 1.0), [[2.0, 0.0], [0.0, 6.0]], None, tmp_path)
    assert result.tolist() == [2.0, 2.0]


def test_to_the_length_of_the_base(tmp_path):
    # both become 10 long; 3/4 and 1/4 of them
    models, base = [[2.0, 0.0], [0.0, 6.0]], [6.0, 8.0]
    result = merged(make(3.0, 1.0, to="base"), models, base, tmp_path / "a")
    assert result.tolist() == pytest.approx([7.5, 2.5])
    result = merged(make(3.0, 1.0, to="base", normalize=False), models, base, tmp_path / "b")
    assert result.tolist() == pytest.approx([30.0, 10.0])


def test_without_a_base_to_the_first_model(tmp_path):
    result = merged(make(1.0, 1.0, to="base"), [[2.0, 0.0], [0.0, 6.0]], None, tmp_path)
    assert result.tolist() == [1.0, 1.0]


def test_to_the_mean_a_base_changes_nothing(tmp_path):
    models = [[2.0, 0.0], [0.0, 6.0]]
    assert merged(make(1.0, 1.0), models, [100.0, 3.0], tmp_path).tolist() == [2.0, 2.0]


def test_by_standard_deviation(tmp_path):
    # deviations 1 and 3 of means 5 and 0: both to 2
    result = merged(make(1.0, 1.0, by="std"), [[4.0, 6.0], [-3.0, 3.0]], None, tmp_path)
    assert result.tolist() == pytest.approx([(8 - 2) / 2, (12 + 2) / 2])


@pytest.mark.parametrize("by", ["norm", "std"])
def test_zero_tensors_stay_zero_and_do_not_count_in_the_mean(tmp_path, by):
    result = merged(make(1.0, 1.0, by=by), [[0.0, 0.0], [-3.0, 3.0]], None, tmp_path)
    assert result.tolist() == [-1.5, 1.5]


@pytest.mark.parametrize("by", ["norm", "std"])
def test_a_reference_of_zero_leaves_models_as_they_are(tmp_path, by):
    models = [[-1.0, 1.0], [-3.0, 3.0]]
    result = merged(make(1.0, 1.0, by=by, to="base"), models, [0.0, 0.0], tmp_path)
    assert result.tolist() == [-2.0, 2.0]


@pytest.mark.parametrize("value", [0.1, 1.0, 1e-20, 1e18])
def test_equal_elements_have_no_deviation(tmp_path, value):
    models = [torch.full((BLOCK + 3,), value), torch.full((BLOCK + 3,), 3 * value)]
    result = merged(make(1.0, 1.0, by="std"), models, None, tmp_path)
    torch.testing.assert_close(result, 2 * models[0])


def oracle(models, base, weights, by, to):
    def size(x):
        return length(x) if by == "norm" else np.sqrt(np.mean((x - np.mean(x)) ** 2))

    sizes = [size(x) for x in models]
    reference = size(base) if to == "base" else sum(sizes) / len(sizes)
    shares = [np.longdouble(w) / sum(weights) for w in weights]
    return [w * reference / s * x for w, s, x in zip(shares, sizes, models, strict=True)]


@pytest.mark.parametrize("by", ["norm", "std"])
@pytest.mark.parametrize("to", ["base", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_equation(tmp_path, kind, by, to):
    for count in (1, 3, 8):
        base, *models = numbers(kind, count)
        weights = [1.5 - 0.3 * i for i in range(count)]
        method = make(*weights, by=by, to=to)
        result = merged(method, models, base, tmp_path / str(count))
        within_law_4(
            method, result, oracle([exact(m) for m in models], exact(base), weights, by, to)
        )


def test_a_small_deviation_around_a_large_mean_keeps_its_digits(tmp_path):
    _, one, other = (x.double() for x in numbers("independent", 2))
    models = [1000 + 1e-3 * one, 1000 + 1e-4 * other]
    method = make(1.0, 1.0, by="std")
    result = merged(method, models, None, tmp_path)
    parts = oracle([exact(m) for m in models], None, [1, 1], "std", "mean")
    assert np.max(np.abs(exact(result) - sum(parts))) <= 1e-8 * 1000 * 11


@pytest.mark.parametrize("sizes", [(1e-38, 1e18), (1e18, 1e-38)])
def test_sizes_far_apart_stay_finite(tmp_path, sizes):
    models = [[sizes[0], 0.0], [0.0, sizes[1]]]
    result = merged(make(1.0, 1.0), models, None, tmp_path)
    assert result.tolist() == pytest.approx([sum(sizes) / 4] * 2, rel=1e-6)


def test_squares_beyond_float64_leave_models_as_they_are(tmp_path):
    models = [torch.tensor([x, 3.0], dtype=torch.float64) for x in (1e200, 3e200)]
    assert merged(make(1.0, 1.0), models, None, tmp_path).tolist() == pytest.approx([2e200, 3])


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_base_that_is_not_finite_does_not_pass_in_silence(tmp_path, number):
    models, base = [[2.0, 0.0], [0.0, 6.0]], [number, 1.0]
    with pytest.raises(NonFiniteError):
        merged(make(1.0, 1.0, to="base"), models, base, tmp_path)


def test_spreads_of_chunks_are_those_of_the_whole():
    values = torch.arange(2 * BLOCK + 5, dtype=torch.float32)[None] + 7
    reduction, parts = Spreads(), []
    for start in (0, BLOCK, 2 * BLOCK, 2 * BLOCK + 5):
        part = reduction.accumulator(None)
        part.add(values[:, start : start + BLOCK], Place("x", start, values.shape[1]))
        parts.append(part)
    for later in parts[1:]:
        parts[0].absorb(later)
    outcome = reduction.finish(parts[0], None)
    assert isinstance(outcome, Done)
    assert values.shape[1] < CHUNK
    assert outcome.result[0].std == pytest.approx(sqrt(((2 * BLOCK + 5) ** 2 - 1) / 12), rel=1e-14)
    assert outcome.result[0].norm == pytest.approx(float(values.double().norm()), rel=1e-14)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"by": "max"}, "by is 'max', expected norm or std"),
        ({"to": "first"}, "to is 'first', expected base or mean"),
        ({"weight": PerModel((1.0, -1.0))}, "normalising would divide by it"),
    ],
)
def test_parameters_out_of_range(parameters, message):
    with pytest.raises(ParameterError, match=message):
        Rescale(**parameters)


def test_copies_are_the_model(tmp_path):
    base, model = numbers("mixed sizes", 1)
    result = merged(make(1.0, 2.0, 3.0), [model] * 3, base, tmp_path)
    torch.testing.assert_close(result, model, rtol=2.0**-22, atol=0)
