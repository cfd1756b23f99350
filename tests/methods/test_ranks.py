"""Ranks of magnitudes within rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from merge_kit.methods.ranks import ascending


def stable(rows):
    return np.argsort(rows.abs().numpy(), axis=1, kind="stable")


def test_columns_from_the_smallest_magnitude_to_the_largest():
    rows = torch.tensor([[3.0, -1.0, 0.0, 2.0], [-1e-38, 1e-40, -5.0, 4.0]])
    assert ascending(rows).tolist() == [[2, 1, 3, 0], [1, 0, 3, 2]]
    assert rows[0].tolist() == [3.0, -1.0, 0.0, 2.0]


def test_of_equal_magnitudes_the_lower_column_comes_first():
    rows = torch.tensor([[2.0, -1.0, 1.0, -2.0, -0.0, 0.0, 1.0]])
    assert ascending(rows).tolist() == [[4, 5, 1, 2, 6, 0, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 1), (7, 3), (40, 64), (3, 5_001), (1, 0), (0, 4)])
def test_equal_to_a_stable_sort(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(shape, generator=generator, dtype=dtype)
    for tied in (rows, (rows * 4).round()):
        assert np.array_equal(ascending(tied).numpy(), stable(tied))


def test_float64_that_is_equal_in_float32_is_told_apart():
    close = 1 + torch.tensor([[3.0, 1.0, 2.0, 1.0]], dtype=torch.float64) * 2.0**-40
    wide = torch.tensor([[1e300, 1e200, 1e-300, 0.0]], dtype=torch.float64)
    assert ascending(torch.cat([close, wide])).tolist() == [[1, 3, 2, 0], [3, 2, 1, 0]]
