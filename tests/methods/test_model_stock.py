"""model_stock: worked by hand, against its equation, and where the equation breaks down."""

from __future__ import annotations

from itertools import combinations
from math import sqrt

import numpy as np
import pytest
import torch

from merge_kit.core.tensors import BLOCK
from merge_kit.methods.model_stock import ModelStock
from tests.methods.vectors import KINDS, SIZE, exact, length, merged, numbers, within_law_4


def terms(models, base):
    """Return base and the shares of the task vectors, of one vector."""
    deltas = [x - base for x in models]
    lengths = [length(d) for d in deltas]
    cosines = [
        np.sum(deltas[i] * deltas[j]) / (lengths[i] * lengths[j])
        if lengths[i] and lengths[j]
        else 0
        for i, j in combinations(range(len(deltas)), 2)
    ]
    count, c = len(deltas), max(0, sum(cosines) / len(cosines))
    t = count * c / (1 + (count - 1) * c)
    return [base, *(t / count * d for d in deltas)]


def row_terms(models, base):
    rows = [terms([x[i] for x in models], base[i]) for i in range(len(base))]
    return [np.stack(parts) for parts in zip(*rows, strict=True)]


def test_sixty_degrees_keep_two_thirds(tmp_path):
    models = [[3.0, 1.0], [2.0, 1.0 + sqrt(3)]]  # deltas (2, 0) and (1, sqrt(3)): c = 1/2
    result = merged(ModelStock(), models, [1.0, 1.0], tmp_path)
    # t = 2 * 0.5 / 1.5 = 2/3 of the mean (1.5, sqrt(3)/2)
    assert result.tolist() == pytest.approx([2.0, 1 + sqrt(3) / 3], rel=1e-6)


def test_right_angles_give_the_base_and_equal_fine_tunes_themselves(tmp_path):
    right = merged(ModelStock(), [[3.0, 1.0], [1.0, 5.0]], [1.0, 1.0], tmp_path / "a")
    assert right.tolist() == [1.0, 1.0]
    equal = merged(ModelStock(), [[3.0, 2.0], [3.0, 2.0]], [1.0, 1.0], tmp_path / "b")
    assert equal.tolist() == pytest.approx([3.0, 2.0], rel=1e-7)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-7, 1e-20])
@pytest.mark.parametrize("filter_wise", [False, True])
def test_the_scale_of_task_vectors_does_not_matter(tmp_path, scale, filter_wise):
    models = [[[2 * scale, 0.0]], [[scale, sqrt(3) * scale]]]
    result = merged(ModelStock(filter_wise=filter_wise), models, [[0.0, 0.0]], tmp_path) / scale
    assert result.tolist()[0] == pytest.approx([1.0, sqrt(3) / 3], rel=1e-6)


@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize(
    "deltas",
    [
        [(1.0, 0.0), (-1.0, 0.0)],  # 1 + (N-1) c = 0
        [(1.0, 0.0), (-0.5, sqrt(0.75)), (-0.5, -sqrt(0.75))],  # the same for three
        [(1.0, 0.0), (-0.9, 0.1)],  # c < 0
        [(0.0, 0.0), (3.0, 4.0)],
        [(0.0, 0.0), (0.0, 0.0)],
    ],
)
def test_task_vectors_without_a_common_direction_give_the_base(tmp_path, deltas, filter_wise):
    models = [[7.0 + x, y] for x, y in deltas]
    result = merged(ModelStock(filter_wise=filter_wise), models, [7.0, 0.0], tmp_path)
    assert result.tolist() == [7.0, 0.0]


def test_a_zero_task_vector_counts_as_a_right_angle(tmp_path):
    models = [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]  # cosines 1, 0, 0: c = 1/3, t = 3/5
    result = merged(ModelStock(), models, [0.0, 0.0], tmp_path)
    assert result.tolist() == pytest.approx([0.6 * 2 / 3, 0.0], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 3, 8])
def test_against_the_equation(tmp_path, kind, count):
    base, *models = numbers(kind, count)
    result = merged(ModelStock(), models, base, tmp_path)
    within_law_4(ModelStock(), result, terms([exact(m) for m in models], exact(base)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40, 33), (2, BLOCK // 2 + 9), (6000, 3), (50, 1), (2, 3, 5)])
def test_by_rows_against_the_equation(tmp_path, kind, shape):
    base, *models = numbers(kind, 3, shape)
    method = ModelStock(filter_wise=True)
    result = merged(method, models, base, tmp_path).reshape(-1, shape[-1])
    flat = [exact(x).reshape(-1, shape[-1]) for x in (base, *models)]
    # task vectors are rounded to 2^-24 before their angle is taken, and in a row of few elements
    # that does not average out; t moves by N times as much as c, whatever t is
    slack = 3 * 2.0**-24 * sum(np.abs(x - flat[0]) for x in flat[1:])
    within_law_4(method, result, row_terms(flat[1:], flat[0]), slack=slack)


def test_a_vector_is_one_row(tmp_path):
    base, *models = numbers("fine-tunes", 2)
    whole = merged(ModelStock(), models, base, tmp_path / "a")
    row = merged(ModelStock(filter_wise=True), models, base, tmp_path / "b")
    torch.testing.assert_close(row, whole, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("shape", [(7, 30_011), (9000, 40)])
def test_by_rows_slab_size_and_threads_change_no_bit(tmp_path, shape):
    base, *models = numbers("fine-tunes", 3, shape)
    results = [
        merged(
            ModelStock(filter_wise=True), models, base, tmp_path / f"{b}{w}", blocks=b, workers=w
        )
        for b, w in ((1, 1), (1, 2), (2, 1), (5, 2))
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_squares_beyond_float64_give_the_base(tmp_path):
    huge = torch.full((3,), 1e200, dtype=torch.float64)
    result = merged(ModelStock(), [huge, huge], torch.zeros(3, dtype=torch.float64), tmp_path)
    assert result.tolist() == [0.0, 0.0, 0.0]


def test_models_in_another_order_give_the_same(tmp_path):
    base, *models = numbers("fine-tunes", 5)
    one = merged(ModelStock(), models, base, tmp_path / "a")
    other = merged(ModelStock(), models[::-1], base, tmp_path / "b")
    assert one.shape == (SIZE,)
    torch.testing.assert_close(one, other, rtol=2.0**-22, atol=2.0**-26)
