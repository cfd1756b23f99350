"""WUDI in closed form: the minimum of its loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import merge_kit as mk
from merge_kit.methods.wudi import WUDI
from tests.methods.spectra import apart, low_rank, normal, task_vector


def loss(merged, deltas):
    return float(sum(((merged - d) @ d.T).square().sum() / d.square().sum() for d in deltas))


def regmean_of_rows(deltas):
    grams = [d.T @ d / d.square().sum() for d in deltas]
    pulled = sum(d @ g for d, g in zip(deltas, grams, strict=True))
    return pulled @ torch.linalg.pinv(sum(grams), rtol=1e-11, hermitian=True)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (60, 12), (3, 40), (1, 9)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_result_is_regmean_with_task_vectors_for_data(shape, count):
    deltas = normal(count, *shape)
    assert apart(task_vector(WUDI(), deltas), regmean_of_rows(deltas)) < 1e-10


def test_no_step_from_the_result_lowers_the_loss():
    deltas = normal(3, 8, 12)
    merged = task_vector(WUDI(), deltas)
    least = loss(merged, deltas)
    for step in normal(6, 8, 12):
        assert loss(merged + 1e-3 * step, deltas) > least
    assert least < loss(sum(deltas), deltas)


def test_gradient_descent_from_the_sum_of_task_vectors_ends_at_the_result():
    """Two tasks of 2 rows in 6 columns: the null space of all rows stays untouched."""
    deltas = normal(2, 2, 6)
    grams = [d.T @ d / d.square().sum() for d in deltas]
    merged = sum(deltas)
    for _ in range(4000):
        merged = merged - sum((merged - d) @ g for d, g in zip(deltas, grams, strict=True))
    assert apart(task_vector(WUDI(), deltas), merged) < 1e-9


def test_a_single_task_vector_comes_back():
    (delta,) = normal(1, 7, 5)
    assert apart(task_vector(WUDI(), [delta]), delta) < 1e-14


def test_tasks_with_orthogonal_rows_are_added():
    """Rows (1, 0) and (0, 2): each task's inputs see its own task vector alone."""
    one = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    two = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    assert apart(task_vector(WUDI(), [one, two]), torch.tensor([[1.0, 2.0]])) < 1e-15


def test_equal_columns_are_averaged():
    """Rows 1 and 3 of one column: G is 1 for both, (1 + 3) / 2 = 2."""
    deltas = [torch.tensor([[value]], dtype=torch.float64) for value in (1.0, 3.0)]
    assert task_vector(WUDI(), deltas).item() == pytest.approx(2.0, rel=1e-15)


def test_a_task_vector_of_zero_is_left_out():
    deltas = normal(2, 5, 6)
    zero = torch.zeros(5, 6, dtype=torch.float64)
    assert torch.equal(task_vector(WUDI(), [*deltas, zero]), task_vector(WUDI(), deltas))


def test_the_result_has_no_more_rows_than_the_task_vectors_span():
    values = torch.linalg.svdvals(task_vector(WUDI(), low_rank(2, 40, 5)))
    assert float(values[10] / values[0]) < 1e-12


def test_tiny_and_huge_task_vectors_keep_their_scale():
    deltas = normal(2, 5, 6)
    plain = task_vector(WUDI(), deltas)
    for scale in (2.0**-600, 2.0**300):
        scaled = task_vector(WUDI(), [d * scale for d in deltas])
        assert apart(scaled / scale, plain) < 1e-12


@pytest.mark.parametrize("ridge", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (16, 16)])
def test_a_ridge_holds_the_result_to_the_sum(shape, ridge):
    """Against the normal equations, with the identity in place of what singular vectors span."""
    generator = torch.Generator().manual_seed(3)
    base, *models = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    weights = [1.0, 0.5, -2.0]
    result = mk.merge_tensors("wudi", models, base=base, weights=weights, ridge=ridge)
    tasks = [(w * (m - base)).numpy() for w, m in zip(weights, models, strict=True)]
    grams = [t.T @ t / np.sum(t * t) for t in tasks]
    total = sum(tasks)
    pull = sum((t - total) @ g for t, g in zip(tasks, grams, strict=True))
    held = sum(grams) + ridge * len(tasks) / shape[1] * np.eye(shape[1])
    wanted = base.numpy() + total + np.linalg.solve(held, pull.T).T
    np.testing.assert_allclose(result.numpy(), wanted, rtol=1e-9, atol=1e-9)


def test_a_strong_ridge_gives_task_arithmetic():
    base, one, other = torch.zeros(4, 4), torch.eye(4), torch.ones(4, 4)
    result = mk.merge_tensors("wudi", [one, other], base=base, ridge=1e9)
    torch.testing.assert_close(result, one + other)
