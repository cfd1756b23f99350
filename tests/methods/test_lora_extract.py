"""What a model changes of its base, matrix by matrix: ranks, factors, and what is told."""

from __future__ import annotations

import pytest
import torch

from merge_kit.errors import ParameterError
from merge_kit.methods.base import Slab
from merge_kit.methods.lora_extract import LoraExtract

CHANGE = torch.tensor([[0.0, 4.0, 0.0], [3.0, 0.0, 0.0]])  # singular values 4 and 3


def slab(change, rank, dtype="F32"):
    flat = change.reshape(1, -1).clone()
    shape = tuple(change.shape)
    return Slab(flat, None, (1.0,), "w", shape, ("a",), 0, 0, {}, (rank,), dtype)


@pytest.mark.parametrize(
    ("parameters", "rank"),
    [
        ({"rank": 1}, 1),
        ({"rank": 9}, 2),
        ({"energy": 0.63}, 1),
        ({"energy": 0.65}, 2),  # 16 of 25 are 0.64
        ({"energy": 1.0}, 2),
    ],
)
def test_the_rank_that_is_asked_for(parameters, rank):
    (found,) = LoraExtract(**parameters).fit(slab(CHANGE, 2), {})
    assert (found.rank, found.norm) == (rank, pytest.approx(5.0))


@pytest.mark.parametrize("parameters", [{"rank": 3}, {"energy": 0.9}])
def test_no_change_has_rank_0(parameters):
    (found,) = LoraExtract(**parameters).fit(slab(torch.zeros(2, 3), 2), {})
    assert (found.rank, found.norm) == (0, 0.0)


def test_factors_share_the_root_of_each_value():
    found = LoraExtract(rank=1).merge(slab(CHANGE, 1), {})
    a, b = (
        factor.reshape(shape) for factor, shape in zip(found.tensors, ((1, 3), (2, 1)), strict=True)
    )
    torch.testing.assert_close(a, torch.tensor([[0.0, 2.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(b, torch.tensor([[2.0], [0.0]], dtype=torch.float64))
    assert found.facts[0] == {"norm": pytest.approx(5.0), "residual": pytest.approx(3.0)}


def test_the_residual_counts_the_rounding_of_the_factors():
    change = torch.full((1, 1), 1.0 + 2**-7)
    found = LoraExtract(rank=1).merge(slab(change, 1, "BF16"), {})
    a, b = (factor.to(torch.bfloat16).double() for factor in found.tensors)
    assert found.facts[0]["residual"] == pytest.approx(abs(float(a * b) - (1 + 2**-7)), abs=1e-12)
    assert found.facts[0]["residual"] > 0


def test_bounds_are_those_of_the_matrix():
    assert LoraExtract(rank=9).rank_bound((), (4, 6)) == 4
    assert LoraExtract(energy=0.5).rank_bound((), (4, 6)) == 4
    assert LoraExtract(rank=3).rank_bound((), (4, 6)) == 3
    assert LoraExtract(rank=3).is_fitted()


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({}, "expected one"),
        ({"rank": 0}, "at least 1"),
        ({"energy": 0.0}, "in \\(0, 1\\]"),
        ({"rank": 1, "energy": 0.5}, "expected one of them"),
    ],
)
def test_parameters_are_checked(parameters, problem):
    with pytest.raises(ParameterError, match=problem):
        LoraExtract(**parameters)
