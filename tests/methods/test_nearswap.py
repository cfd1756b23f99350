"""nearswap: worked by hand and against its equation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from merge_kit.errors import ParameterError
from merge_kit.methods.nearswap import NearSwap
from tests.methods.vectors import KINDS, exact, merged, numbers, within_law_4


def test_near_elements_swap_and_far_ones_move_by_t(tmp_path):
    result = merged(NearSwap(t=0.5), [[1.25, 4.0, -4.0, 1.0]], [1.0, 1.0, 1.0, 1.0], tmp_path)
    assert result.tolist() == [1.25, 1.5, 0.5, 1.0]


@pytest.mark.parametrize("t", [1e-7, 1e-8, 1e-30])
def test_a_t_below_a_millionth_moves_by_t(tmp_path, t):
    result = merged(NearSwap(t=t), [[t / 2, 1.0, -1.0]], [0.0, 0.0, 0.0], tmp_path)
    assert (result / t).tolist() == pytest.approx([0.5, 1.0, -1.0])


def test_nothing_moves_at_0_and_everything_at_a_large_t(tmp_path):
    base, model = numbers("independent", 1)
    assert torch.equal(merged(NearSwap(t=0.0), [model], base, tmp_path / "a"), base)
    swapped = merged(NearSwap(t=1e300), [model], base, tmp_path / "b")
    torch.testing.assert_close(swapped, model, rtol=0, atol=2.0**-22 * float(base.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [1e-9, 1e-3, 0.7])
def test_against_the_equation(tmp_path, kind, t):
    base, model = numbers(kind, 1)
    result = merged(NearSwap(t=t), [model], base, tmp_path)
    apart = exact(model) - exact(base)
    move = np.sign(apart) * np.minimum(np.abs(apart), t)
    within_law_4(NearSwap(t=t), result, [exact(base), move])


@pytest.mark.parametrize("t", [-0.1, float("nan"), float("inf")])
def test_t_out_of_range(t):
    with pytest.raises(ParameterError, match="expected a number from 0"):
        NearSwap(t=t)
