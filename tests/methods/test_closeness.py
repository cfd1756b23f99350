from __future__ import annotations

import pytest
import torch

from merge_kit.errors import NonFiniteError
from merge_kit.methods.closeness import directions, products


def draw(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def found(b: torch.Tensor, a: torch.Tensor, scale: float = 1.0):
    return directions(b, a, scale, where="q_proj")


def test_a_change_is_its_singular_values_and_vectors():
    b, a = draw(0, 1, 7, 3), draw(1, 1, 3, 5)
    one = found(b, a, -2.0)
    whole = one.left * one.values.unsqueeze(1) @ one.right
    torch.testing.assert_close(whole, -2.0 * b @ a, rtol=0, atol=1e-13)
    assert one.ranks == (3,)
    assert one.square == pytest.approx(float((2 * b @ a).square().sum()), rel=1e-13)


def test_products_are_those_of_dense_matrices():
    changes = [(draw(0, 1, 7, 3), draw(1, 1, 3, 5), 0.5), (draw(2, 1, 7, 2), draw(3, 1, 2, 5), 2.0)]
    both = products(*(found(*change) for change in changes))
    one, other = (scale * (b @ a)[0] for b, a, scale in changes)
    assert both.dot == pytest.approx(float((one * other).sum()), rel=1e-12)
    u1, u2 = (torch.linalg.svd(d)[0][:, :r] for d, r in ((one, 3), (other, 2)))
    v1, v2 = (torch.linalg.svd(d)[2][:r] for d, r in ((one, 3), (other, 2)))
    assert both.left == pytest.approx(float((u1.T @ u2).square().sum()), rel=1e-12)
    assert both.right == pytest.approx(float((v1 @ v2.T).square().sum()), rel=1e-12)
    assert (both.least, both.left_chance, both.right_chance) == (2, 6 / 7, 6 / 5)


def test_spaces_by_hand():
    b, a = torch.eye(4, 2).double()[None], torch.eye(2, 3).double()[None]  # writes and reads e1, e2
    other = found(
        torch.eye(4).double()[None, :, 1:3], torch.eye(3).double()[None, :2]
    )  # e2 e1^T + e3 e2^T
    both = products(found(b, a), other)
    assert (both.dot, both.left, both.right, both.least) == (0.0, 1.0, 2.0, 2)


def test_a_rank_that_the_factors_only_promise_is_not_counted():
    b = draw(0, 1, 7, 3)
    b[:, :, 2] = b[:, :, 0] - b[:, :, 1]  # two columns that count
    a = draw(1, 1, 3, 5)
    assert found(b, a).ranks == (2,)
    assert found(torch.zeros_like(b), a).ranks == (0,)
    both = products(found(torch.zeros_like(b), a), found(b, a))
    assert (both.dot, both.left, both.right, both.least) == (0.0, 0.0, 0.0, 0)


@pytest.mark.parametrize("scale", [1e151, 1e307, -1e308])
def test_a_change_whose_squares_overflow_is_refused_by_name(scale):
    b, a = draw(0, 1, 7, 3), draw(1, 1, 3, 5)
    with pytest.raises(NonFiniteError, match="q_proj: the change is too large to be compared"):
        found(b, a, scale)
    assert found(b, a, 1e148).square > 1e296


@pytest.mark.parametrize("spread", [1e8, 1e15])
def test_columns_that_are_as_large_as_rows_are_small_lose_nothing(spread):
    b, a = draw(0, 1, 20, 3), draw(1, 1, 3, 30)
    sizes = torch.tensor([spread, 1.0, 1 / spread], dtype=torch.float64)
    one, other = found(b * sizes, a / sizes[:, None]), found(b, a)
    assert one.ranks == other.ranks == (3,)
    both = products(one, other)
    assert both.dot == pytest.approx(other.square, rel=1e-12)
    assert both.left == pytest.approx(3.0)


def test_ranks_may_be_larger_than_the_matrix():
    b, a = draw(0, 1, 2, 6), draw(1, 1, 6, 5)
    one = found(b, a)
    torch.testing.assert_close(one.left * one.values.unsqueeze(1) @ one.right, b @ a)
    assert products(one, one).left == pytest.approx(2.0)


def test_blocks_have_nothing_to_do_with_one_another():
    b, a = draw(0, 3, 7, 2), draw(1, 3, 2, 5)
    other = b.roll(1, 0), a.roll(1, 0)
    together = products(found(b, a), found(*other))
    alone = [
        products(found(b[i : i + 1], a[i : i + 1]), found(*(f[i : i + 1] for f in other)))
        for i in range(3)
    ]
    assert together.dot == pytest.approx(sum(one.dot for one in alone), rel=1e-12)
    assert together.left == pytest.approx(sum(one.left for one in alone), rel=1e-12)
    assert together.least == 6


def test_values_that_are_not_finite_are_named():
    a = draw(1, 1, 3, 5)
    a[0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="factor a holds values that are not finite") as caught:
        found(draw(0, 1, 7, 3), a)
    assert caught.value.where == "q_proj"
