"""Sums of adapters in the bases of their factors, held to sums of dense matrices in float64."""

from __future__ import annotations

from math import isnan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.errors import SolveError
from merge_kit.methods.base import PerModel
from merge_kit.methods.lora_concat import LoraConcat
from merge_kit.methods.lora_knots import LoraKnots
from merge_kit.methods.lora_linear import LoraLinear
from merge_kit.methods.lora_svd import LoraSvd
from tests.methods.factor_slabs import (
    change,
    close,
    diagonal,
    factor_slab,
    made,
    pair,
    summed,
    total,
)

SHAPES = [(40, 30), (9, 200), (200, 9), (1, 30), (30, 1), (1, 1), (12, 12)]
WEIGHTS = (0.5, -2.0, 1.25)
METHODS = [LoraSvd(), LoraLinear(), LoraKnots(density=PerModel([1.0, 1.0, 1.0]))]
every_sum = pytest.mark.parametrize("method", METHODS[:2], ids=lambda m: m.method_name)
every = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.method_name)


def three(shape):
    """Return three changes whose ranks add up to 15: more than some shapes have directions."""
    return [pair(rank, shape, seed) for seed, rank in enumerate((4, 8, 3))]


def lengths(pairs, weights) -> float:
    return sum(abs(w) * float(change(p).norm()) for p, w in zip(pairs, weights, strict=True))


@every_sum
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sum_of_full_rank_is_the_sum(method, shape):
    pairs = three(shape)
    rank = min(15, *shape)
    found = summed(method, pairs, WEIGHTS, rank)
    assert close(found, total(pairs, WEIGHTS), lengths(pairs, WEIGHTS))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_truncated_sum_misses_the_energy_of_the_tail_and_no_more(shape, rank):
    """No matrix of this rank is closer (Eckart and Young)."""
    pairs = three(shape)
    wanted = total(pairs, WEIGHTS)
    values = torch.linalg.svdvals(wanted)
    slab = factor_slab(pairs, WEIGHTS, (min(rank, *shape),))
    (facts,) = LoraSvd(rank=rank).merge(slab, {}).facts
    tail = float(values[rank:].square().sum().sqrt())
    (found,) = made(LoraSvd(rank=rank), slab)
    size = lengths(pairs, WEIGHTS)
    assert facts["norm"] == pytest.approx(float(wanted.norm()), abs=1e-12 * size)
    assert facts["residual"] == pytest.approx(tail, abs=1e-12 * size)
    assert float((wanted - change(found)).norm()) == pytest.approx(tail, abs=1e-12 * size)


@given(
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(1, 8),
    st.data(),
)
def test_any_ranks_and_weights_give_the_closest_factors(shape, ranks, rank, data):
    weights = data.draw(st.lists(st.floats(-4, 4), min_size=len(ranks), max_size=len(ranks)))
    pairs = [pair(r, shape, seed) for seed, r in enumerate(ranks)]
    bound = LoraSvd(rank=rank).rank_bound(ranks, shape)
    wanted = total(pairs, weights)
    found = summed(LoraSvd(rank=rank), pairs, weights, bound)
    tail = float(torch.linalg.svdvals(wanted)[rank:].square().sum().sqrt())
    error = float((wanted - found).norm())
    assert error == pytest.approx(tail, abs=1e-12 * lengths(pairs, weights) + 1e-300)


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "F16"])
@pytest.mark.parametrize("rank", [3, 15])
def test_the_residual_is_that_of_the_rounded_factors(dtype, rank):
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
    kind = kinds.get(dtype, torch.bfloat16)
    pairs = three((40, 30))
    slab = factor_slab(pairs, WEIGHTS, (rank,), dtype)
    (facts,) = LoraSvd(rank=rank).merge(slab, {}).facts
    ((a, b),) = made(LoraSvd(rank=rank), slab)
    wanted = total(pairs, WEIGHTS)
    missed = float((wanted - b.to(kind).double() @ a.to(kind).double()).norm())
    assert facts["residual"] == pytest.approx(missed, rel=1e-6, abs=1e-12 * float(wanted.norm()))


@pytest.mark.parametrize(
    ("energy", "rank"),
    [(1e-17, 1), (0.5, 1), (0.9, 1), (0.91, 2), (0.989, 2), (0.999, 3), (1.0, 3)],
)
def test_energy_is_a_share_of_the_squares(energy, rank):
    """9, 0.9 and 0.1 of 10."""
    slab = factor_slab([diagonal(0.9**0.5, 3.0, 0.1**0.5)], (1.0,))
    (found,) = LoraSvd(energy=energy).fit(slab, {})
    assert (found.rank, found.norm) == (rank, pytest.approx(10**0.5))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(1, 100))
def test_the_rank_of_an_energy_is_the_smallest_that_keeps_it(values, percent):
    """In integers, where a share that is met is met."""
    squares = sorted((v * v for v in values), reverse=True)
    held = [100 * sum(squares[:r]) >= percent * sum(squares) for r in range(len(values) + 1)]
    slab = factor_slab([diagonal(*map(float, values))], (1.0,))
    assert LoraSvd(energy=percent / 100).fit(slab, {})[0].rank == held.index(True)


@every
def test_the_order_of_adapters_changes_nothing(method):
    pairs = three((40, 30))
    there = summed(method, pairs, WEIGHTS, 15)
    assert close(summed(method, pairs[::-1], WEIGHTS[::-1], 15), there, lengths(pairs, WEIGHTS))


@every_sum
def test_weights_scale_the_sum(method):
    pairs = three((40, 30))
    once, twice = (summed(method, pairs, [f * w for w in WEIGHTS], 4) for f in (1, -2))
    assert close(twice, -2 * once, lengths(pairs, WEIGHTS))


@every
def test_uses_that_share_a_step_are_what_each_is_by_itself(method):
    pairs, other = three((40, 30)), (0.0, 1.0, 3.0)
    together = made(method, factor_slab(pairs, (*WEIGHTS, *other), (15, 6)))
    for weights, rank, (a, b) in zip((WEIGHTS, other), (15, 6), together, strict=True):
        ((alone_a, alone_b),) = made(method, factor_slab(pairs, weights, (rank,)))
        assert torch.equal(a, alone_a)
        assert torch.equal(b, alone_b)


@every_sum
def test_an_adapter_minus_itself_is_nothing(method):
    one = pair(4, (40, 30))
    slab = factor_slab([one, one], (1.5, -1.5), (3,), "F32")
    (spectrum,) = LoraLinear().fit(slab, {})
    assert spectrum.rank == 0
    assert spectrum.norm <= 1e-12 * float(change(one).norm())
    ((a, b),) = made(method, slab)
    assert not a.any()
    assert not b.any()
    assert (a.shape, b.shape) == ((3, 30), (40, 3))


@every
def test_weights_of_zero_give_zeros_of_the_shape_that_is_asked_for(method):
    slab = factor_slab(three((40, 30)), (0.0, 0.0, 0.0), (5,))
    ((a, b),) = made(method, slab)
    assert (a.shape, b.shape) == ((5, 30), (40, 5))
    assert not a.any()
    assert not b.any()
    assert method.merge(slab, {}).facts == [{"norm": 0.0, "residual": 0.0}]
    assert method.fit(slab, {})[0].rank == 0


@every
def test_what_a_rank_has_more_than_the_change_is_zeros(method):
    pairs = three((40, 30))
    ((a, b),) = made(method, factor_slab(pairs, WEIGHTS, (20,)))
    assert (a.shape, b.shape) == ((20, 30), (40, 20))
    assert not a[15:].any()
    assert not b[:, 15:].any()
    assert a[:15].norm(dim=1).min() > 0


def test_factors_have_numbers_of_one_size_and_one_sign():
    ((a, b),) = made(LoraSvd(), factor_slab(three((40, 30)), WEIGHTS, (15,)))
    values = torch.linalg.svdvals(total(three((40, 30)), WEIGHTS))[:15]
    assert torch.allclose(a.norm(dim=1), values.sqrt(), rtol=1e-12)
    assert torch.allclose(b.norm(dim=0), values.sqrt(), rtol=1e-12)
    largest = b.gather(0, b.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_give_nan_for_the_engine_to_find(method, bad):
    a, b = pair(4, (40, 30))
    a[1, 2] = bad
    slab = factor_slab([(a, b), *three((40, 30))[1:]], WEIGHTS, (5,))
    (found,) = made(method, slab)
    assert [tuple(one.shape) for one in found] == [(5, 30), (40, 5)]
    assert all(bool(one.isnan().all()) for one in found)
    (spectrum,) = method.fit(slab, {})
    assert isnan(spectrum.norm)
    assert spectrum.rank == 5  # it is not left out as if nothing changed


@every_sum
def test_changes_beyond_float64_give_nan_for_the_engine_to_find(method):
    pairs = three((40, 30))
    slab = factor_slab(pairs, (1e308, 1e308, 1.0), (5,))
    (found,) = made(method, slab)
    assert [tuple(one.shape) for one in found] == [(5, 30), (40, 5)]
    assert all(bool(one.isnan().all()) for one in found)
    (spectrum,) = method.fit(slab, {})
    assert (spectrum.rank, isnan(spectrum.norm)) == (15, True)
    assert type(method)().merge(slab, {}).facts == [{}]


def test_a_change_whose_squares_overflow_keeps_its_rank_and_its_norm():
    method, pairs, weights = LoraSvd(energy=1.0), three((40, 30)), tuple(1e200 * w for w in WEIGHTS)
    (spectrum,) = method.fit(factor_slab(pairs, weights), {})
    assert spectrum.rank == 15
    assert spectrum.norm == pytest.approx(1e200 * float(total(pairs, WEIGHTS).norm()), rel=1e-12)
    found = summed(method, pairs, weights, 15)
    assert close(found / 1e200, total(pairs, WEIGHTS), lengths(pairs, WEIGHTS))


@every
def test_a_decomposition_that_fails_is_an_error_that_names_the_tensor(monkeypatch, method):
    def fails(*_arguments, **_options):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fails)
    with pytest.raises(SolveError, match="did not converge") as caught:
        method.merge(factor_slab(three((40, 30)), WEIGHTS, (5,)), {})
    assert caught.value.where == "x.lora_A.weight"
    assert "lora_concat" in caught.value.hint


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18, 1e30])
@every
def test_tiny_and_huge_factors_keep_their_digits(method, size):
    """b as small or large as float32 holds: no square on the way leaves float64."""
    pairs = [(a, size * b) for a, b in three((40, 30))]
    method_at_one = summed(method, three((40, 30)), WEIGHTS, 15)
    assert close(
        summed(method, pairs, WEIGHTS, 15) / size, method_at_one, lengths(three((40, 30)), WEIGHTS)
    )


BOUNDS = [
    (LoraConcat(), (4, 8), (40, 30), 12),
    (LoraConcat(), (4, 8), (5, 30), 12),
    (LoraLinear(), (4, 8), (40, 30), 12),
    (LoraLinear(), (4, 8), (5, 30), 5),
    (LoraSvd(), (4, 8), (40, 30), 8),
    (LoraSvd(), (4, 8), (5, 30), 5),
    (LoraSvd(rank=10), (4, 8), (40, 30), 10),
    (LoraSvd(rank=64), (4, 8), (40, 30), 12),
    (LoraSvd(energy=0.9), (4, 8), (40, 30), 12),
    (LoraKnots(), (4, 8), (40, 30), 12),
    (LoraKnots(), (4, 8), (5, 30), 5),
    (LoraKnots(rank=3), (4, 8), (40, 30), 3),
]


@pytest.mark.parametrize(("method", "ranks", "shape", "bound"), BOUNDS)
def test_a_rank_is_bounded_by_what_is_asked_for_the_ranks_and_the_sides(
    method, ranks, shape, bound
):
    assert method.rank_bound(ranks, shape) == bound


def test_one_adapter_stays_as_it_is_where_nothing_is_asked_of_it():
    assert LoraConcat().keeps_one(8)
    assert LoraLinear().keeps_one(8)
    assert LoraSvd().keeps_one(8)
    assert LoraSvd(rank=8).keeps_one(8)
    assert not LoraSvd(rank=7).keeps_one(8)
    assert not LoraSvd(energy=1.0).keeps_one(8)
    assert [m.is_fitted() for m in (LoraSvd(), LoraSvd(energy=0.5), LoraLinear())] == [0, 1, 1]


@pytest.mark.parametrize("method", [method for method, *_ in BOUNDS] + [LoraLinear(variant="peft")])
def test_a_module_that_no_adapter_changes_has_no_rank(method):
    assert method.rank_bound((), (40, 30)) == 0


def test_an_adapter_that_is_named_twice_counts_once_but_where_it_votes():
    assert [m.additive for m in (LoraConcat(), LoraSvd(), LoraLinear(), LoraKnots())] == [
        1,
        1,
        1,
        0,
    ]


def test_parameters_of_some_models_are_those_of_a_module():
    method = LoraKnots(weight=PerModel([1.0, 2.0, 3.0]), density=PerModel([0.1, 0.2, 0.3]))
    some = method.of_entries([2, 0])
    assert (some.weight, some.density) == (PerModel([3.0, 1.0]), PerModel([0.3, 0.1]))
