"""Changes that are merged element by element, compressed, held to dense decompositions."""

from __future__ import annotations

from math import isnan

import pytest
import torch

from merge_kit.errors import ParameterError
from merge_kit.methods.base import PerModel
from merge_kit.methods.dare_linear import DareLinear
from merge_kit.methods.dare_ties import DareTies
from merge_kit.methods.lora_dare import LoraDare
from merge_kit.methods.lora_ties import LoraTies
from merge_kit.methods.ties import Ties
from tests.methods.factor_slabs import dense_slab, made

METHODS = [LoraTies(), LoraDare()]
every = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.method_name)
SHAPES = [(40, 30), (9, 200), (200, 9), (1, 30), (30, 1), (1, 1), (12, 12)]


def dense(shape, kind=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(kind)


def close_to(number: float, size: float):
    """Six digits of the whole: dense decompositions start from squares, see `truncated`."""
    return pytest.approx(number, rel=1e-6, abs=1e-6 * size)


@every
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_a_change_is_compressed_to_the_closest_factors(method, shape, rank):
    matrix = dense(shape)
    slab = dense_slab(matrix, (rank,))
    ((a, b),) = made(method, slab)
    (facts,) = method.merge(slab, {}).facts
    assert (a.shape, b.shape) == ((rank, shape[1]), (shape[0], rank))
    size = float(matrix.norm())
    tail = float(torch.linalg.svdvals(matrix)[rank:].square().sum().sqrt())
    assert float((matrix - b @ a).norm()) == close_to(tail, size)
    assert facts["residual"] == close_to(tail, size)
    assert facts["norm"] == pytest.approx(size)
    assert not a[min(shape) :].any()


def rounded_once(values, dtype):
    """Return float64 numbers as the dtype has them; torch would round twice, by way of float32."""
    digits = {"F32": 24, "BF16": 8, "F16": 11}[dtype]
    mantissa, exponent = torch.frexp(values.double())
    return torch.ldexp((mantissa * 2.0**digits).round(), exponent - digits)  # half to even


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_the_residual_is_that_of_the_rounded_factors(dtype):
    matrix = dense((700, 400), torch.float32)  # several tiles
    slab = dense_slab(matrix, (5,), dtype)
    ((a, b),) = made(LoraTies(), slab)
    missed = float((matrix.double() - rounded_once(b, dtype) @ rounded_once(a, dtype)).norm())
    assert LoraTies().merge(slab, {}).facts[0]["residual"] == pytest.approx(missed, rel=1e-12)


def test_factors_have_numbers_of_one_size_and_one_sign():
    ((a, b),) = made(LoraTies(), dense_slab(dense((40, 30)), (6,)))
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-9)
    assert (b.gather(0, b.abs().argmax(0, keepdim=True)) > 0).all()


@every
def test_energy_finds_the_smallest_rank_that_keeps_it(method):
    values = torch.diag(torch.tensor([1.0, 3.0, 0.5, 0.0])).double()
    for energy, rank in ((0.5, 1), (0.87, 1), (0.9, 2), (0.97, 2), (0.98, 3), (1.0, 3)):
        some = type(method)(energy=energy)  # of 10.25: 0.878, 0.976, 1
        assert some.is_fitted()
        (found,) = some.fit(dense_slab(values), {})
        assert (found.rank, found.norm) == (rank, pytest.approx(10.25**0.5))


@every
def test_nothing_comes_out_as_nothing(method):
    slab = dense_slab(torch.zeros(5, 4), (3,))
    ((a, b),) = made(method, slab)
    assert not a.any()
    assert not b.any()
    assert method.merge(slab, {}).facts == [{"norm": 0.0, "residual": 0.0}]
    assert type(method)(energy=0.5).fit(slab, {})[0].rank == 0


@every
def test_a_change_that_is_not_finite_shows_in_the_factors(method):
    matrix = dense((5, 4))
    matrix[1, 2] = torch.inf
    ((a, b),) = made(method, dense_slab(matrix, (3,)))
    assert bool(a.isnan().any())
    assert bool(b.isnan().any())
    (found,) = type(method)(energy=0.5).fit(dense_slab(matrix, (4,)), {})
    assert isnan(found.norm)
    assert found.rank == 4  # it is not left out as if nothing changed


def test_elements_are_merged_by_the_methods_of_full_models():
    each = {"weight": PerModel([1.0, -0.5]), "density": PerModel([0.3, 0.4])}
    assert LoraTies(
        **each, normalize=False, rescale=True, lambda_=2.0, elect="count"
    ).elementwise() == (Ties(**each, normalize=False, rescale=True, lambda_=2.0, elect="count"))
    assert LoraDare(**each, normalize=True, rescale=False, lambda_=2.0).elementwise() == (
        DareLinear(**each, normalize=True, rescale=False, lambda_=2.0)
    )
    assert LoraDare(**each, ties=True).elementwise() == DareTies(**each)
    assert LoraTies(**each).elementwise() == Ties(**each)


@every
def test_a_rank_is_bounded_by_the_sides_alone(method):
    some = type(method)
    assert some().rank_bound((4, 8), (40, 30)) == 12
    assert some().rank_bound((4, 8), (5, 30)) == 5
    assert some(rank=20).rank_bound((4, 8), (40, 30)) == 20
    assert some(rank=64).rank_bound((4, 8), (40, 30)) == 30
    assert some(energy=0.9).rank_bound((4, 8), (40, 30)) == 30


@every
def test_one_adapter_stays_as_it_is_where_nothing_is_asked_of_it(method):
    some, one = type(method), {"weight": PerModel([1.0])}
    assert some(**one).keeps_one(8)
    assert some(**one, rank=8).keeps_one(8)
    assert not some(**one, rank=7).keeps_one(8)
    assert not some(**one, energy=1.0).keeps_one(8)
    assert not some(**one, lambda_=0.5).keeps_one(8)
    assert not some(**one, density=PerModel([0.5])).keeps_one(8)
    assert not some.additive


def test_a_module_of_one_adapter_alone_is_not_the_mean_of_all():
    two = {"weight": PerModel([1.0, 3.0])}
    assert LoraTies(**two).keeps_one(8)  # those that agree: one
    assert LoraDare(**two, ties=True, normalize=True).keeps_one(8)
    assert not LoraDare(**two, normalize=True).keeps_one(8)  # a quarter of it


def test_weights_that_cancel_cannot_be_normalised():
    with pytest.raises(ParameterError, match="sums to 0"):
        LoraDare(weight=PerModel([1.0, -1.0]), normalize=True)
    assert LoraDare(weight=PerModel([1.0, -1.0]), normalize=True, ties=True).normalize
