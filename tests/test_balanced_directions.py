"""Merges by directions where there is none: opposite, balanced and zero vectors, by hand."""

from __future__ import annotations

import json
from math import sqrt

import pytest
import torch

from tests.toys import merge, write

A = torch.tensor([3.0, -4.0, 0.0])
ZERO = torch.zeros(3)


def merged(folder, method, models, weights=None, *, base=None, **parameters):
    """Return the merge of vectors."""
    entries = []
    for i, model in enumerate(models):
        write(folder / f"m{i}", {"x": model}, None)
        entries.append({"model": f"m{i}"})
        if weights:
            entries[-1]["parameters"] = {"weight": weights[i]}
    text = {"merge_method": method, "models": entries, "parameters": parameters}
    if base is not None:
        write(folder / "base", {"x": base}, None)
        text["base_model"] = "base"
    return merge(json.dumps(text), folder)["x"]


def test_opposite_models_pass_through_zero(tmp_path):
    """x - 2 t x: the line between x and -x."""
    for t in (0.25, 0.5, 0.8):
        between = merged(tmp_path / f"s{t}", "slerp", [-A], base=A, t=t)
        torch.testing.assert_close(between, A * (1 - 2 * t))
        weighed = merged(tmp_path / f"n{t}", "nuslerp", [A, -A], [1 - t, t])
        torch.testing.assert_close(weighed, A * (1 - 2 * t))


@pytest.mark.parametrize("t", [0.25, 0.5])
def test_beside_a_zero_vector_the_way_is_straight(tmp_path, t):
    """Not sin(t pi / 2), the factor of a right angle."""
    assert torch.equal(merged(tmp_path / "a", "slerp", [A], base=ZERO, t=t), A * t)
    assert torch.equal(merged(tmp_path / "b", "slerp", [ZERO], base=A, t=t), A * (1 - t))
    torch.testing.assert_close(
        merged(tmp_path / "c", "nuslerp", [A, ZERO], [1 - t, t]), A * (1 - t)
    )


@pytest.mark.parametrize("order", [1, -1])
def test_models_that_balance_give_their_mean(tmp_path, order):
    """Whichever is listed first: (2 x - x) / 2 for two, 0 for three at 120 degrees."""
    two = [2 * A, -A][::order]
    torch.testing.assert_close(merged(tmp_path / "a", "karcher", two), A / 2)
    torch.testing.assert_close(merged(tmp_path / "b", "multislerp", two, [0.5, 0.5]), A / 2)
    turn = torch.tensor([[-0.5, sqrt(3) / 2], [-sqrt(3) / 2, -0.5]])
    first = torch.tensor([5.0, 0.0])
    three = [first, turn @ first, turn @ turn @ first][::order]  # balanced but for rounding
    assert merged(tmp_path / "c", "karcher", three).abs().max() <= 1e-6
    four = [A, -A, A.flip(0), -A.flip(0)][::order]
    assert torch.equal(merged(tmp_path / "d", "multislerp", four, [1, 1, 1, 1]), ZERO)
    assert torch.equal(merged(tmp_path / "e", "karcher", four), ZERO)


def test_a_zero_vector_has_no_direction_but_a_length(tmp_path):
    """The direction of the others, and the mean of the lengths 5, 5 and 0."""
    result = merged(tmp_path, "karcher", [A, A, ZERO])
    torch.testing.assert_close(result, A * 2 / 3)


def test_a_zero_task_vector_is_at_right_angles_to_all(tmp_path):
    """Of x, x and 0 the mean cosine is (1 + 0 + 0) / 3, and t = 3 c / (1 + 2 c) = 0.6."""
    base = torch.tensor([1.0, 1.0, 1.0])
    none = merged(tmp_path / "a", "model_stock", [base + A, base], base=base)
    assert torch.equal(none, base)
    some = merged(tmp_path / "b", "model_stock", [base + A, base + A, base], base=base)
    torch.testing.assert_close(some, base + 0.6 * (2 * A / 3))


def test_task_vectors_at_less_than_right_angles_stay_between(tmp_path):
    """cos 120 degrees = -1/2 would give t = -1 / (1/2) = -2 for two."""
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([-0.5, sqrt(3) / 2])
    base = torch.tensor([7.0, 8.0])
    result = merged(tmp_path, "model_stock", [base + one, base + other], base=base)
    assert torch.equal(result, base)
