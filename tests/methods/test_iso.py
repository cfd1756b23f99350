"""Iso-C and Iso-CTS against the equations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from merge_kit.errors import ParameterError
from merge_kit.methods.iso_c import IsoC
from merge_kit.methods.iso_cts import IsoCTS
from tests.methods.spectra import apart, low_rank, normal, task_vector

SHAPES = pytest.mark.parametrize("shape", [(12, 20), (20, 12), (60, 12), (12, 12)])


def polar(matrix):
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


def common_and_specific(deltas, common):
    """Return Iso-CTS with all singular vectors of numpy."""
    total, size = sum(deltas).numpy(), min(deltas[0].shape)
    own = round((size - int(size * common)) / len(deltas))
    shared = size - own * len(deltas)
    left, values, right = np.linalg.svd(total, full_matrices=False)
    found = [(left[:, :shared], values[:shared], right[:shared])]
    for delta in deltas:
        rest = delta.numpy() - found[0][0] @ (found[0][0].T @ delta.numpy())
        u, s, v = np.linalg.svd(rest, full_matrices=False)
        found.append((u[:, :own], s[:own], v[:own]))
    lefts, values, rights = zip(*found, strict=True)
    directions = polar(np.concatenate(lefts, axis=1)) @ polar(np.concatenate(rights))
    return torch.from_numpy(np.concatenate(values).mean() * directions)


@SHAPES
def test_iso_c_is_the_mean_singular_value_times_the_polar_factor(shape):
    deltas = normal(3, *shape)
    total = sum(deltas).numpy()
    mean = np.linalg.svd(total, compute_uv=False).mean()
    assert apart(task_vector(IsoC(), deltas), torch.from_numpy(mean * polar(total))) < 1e-12


@SHAPES
@pytest.mark.parametrize("common", [0.5, 0.8, 1.0])
def test_iso_cts_is_that_of_the_equation(shape, common):
    deltas = normal(3, *shape)
    wanted = common_and_specific(deltas, common)
    assert apart(task_vector(IsoCTS(common=common), deltas), wanted) < 1e-12


def test_iso_c_by_hand():
    """diag(3, 1, 0): the mean is 4/3 of all, 2 of the rank; where nothing is, nothing comes."""
    delta = torch.diag(torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64))
    shape = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    assert apart(task_vector(IsoC(), [delta]), 4 / 3 * shape) < 1e-15
    assert apart(task_vector(IsoC(mean_over="rank"), [delta]), 2.0 * shape) < 1e-15


def test_a_single_model_does_not_come_back():
    (delta,) = normal(1, 8, 8)
    assert apart(task_vector(IsoC(), [delta]), delta) > 0.1
    assert "single" not in IsoC.laws


def test_iso_c_keeps_the_rank_of_a_sum_and_its_spectrum_is_flat():
    values = torch.linalg.svdvals(task_vector(IsoC(), low_rank(2, 40, 5)))
    assert torch.allclose(values[:10], values[0].expand(10), rtol=1e-12)
    assert float(values[10]) < 1e-12


def test_with_all_directions_common_iso_cts_is_iso_c():
    deltas = normal(3, 10, 14)
    assert apart(task_vector(IsoCTS(common=1.0), deltas), task_vector(IsoC(), deltas)) < 1e-12


def test_lambda_scales_the_task_vector():
    deltas = normal(2, 6, 9)
    for kind in (IsoC, IsoCTS):
        assert apart(task_vector(kind(lambda_=1.5), deltas), 1.5 * task_vector(kind(), deltas)) < (
            1e-14
        )


@pytest.mark.parametrize("common", [-0.1, 1.5, float("nan")])
def test_common_is_a_share(common):
    with pytest.raises(ParameterError, match=r"common is .*, expected a number in \[0, 1\]"):
        IsoCTS(common=common)
