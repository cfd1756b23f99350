"""Low-rank changes and what they are put together of, read through a merge."""

from __future__ import annotations

import itertools
from functools import reduce

import pytest
import torch

from merge_kit.core.tensors import BLOCK
from merge_kit.methods.base import PerModel
from merge_kit.methods.passthrough import Passthrough
from merge_kit.methods.slerp import Slerp
from merge_kit.methods.ties import Ties
from merge_kit.plan import residency
from merge_kit.plan.sources import (
    Columns,
    Concat,
    Generated,
    LowRank,
    Normed,
    Rows,
    Sum,
    Transposed,
    View,
)
from tests.engine.handmade import run, step, stored

GENERATOR = torch.Generator().manual_seed(11)
SIZES = tuple(itertools.product((1, 2, None), (1, 2)))
"""Blocks of a slab, workers."""


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=GENERATOR).to(dtype)


def read(source, folder, *, dtype="F32", sizes=SIZES):
    """Return what a source yields, the same bits for every slab size and number of threads."""
    found = [
        run(
            [step(Passthrough(), [source], dtype=dtype)],
            folder / f"{blocks}-{workers}",
            blocks=blocks,
            workers=workers,
        )["x"]
        for blocks, workers in sizes
    ]
    assert all(torch.equal(found[0], other) for other in found[1:])
    return found[0]


def close(found, oracle, magnitudes, rank=1):
    """Hold values to the measure of rounding: 2^-22 times the sum of what is added.

    A sum of `rank` products is rounded once for each of them, 2^-24 of what it has grown to.
    """
    measure = 2.0**-22 * (1 + rank / 4)
    assert bool(((found.double() - oracle).abs() <= measure * magnitudes).all())


def low_rank(folder, name, rows, columns, rank, *, scale=0.7, dtype=torch.float32):
    """Return factors as a source without a weight, their product in float64, and its magnitudes."""
    a, b = normal(rank, columns, dtype=dtype), normal(rows, rank, dtype=dtype)
    source = LowRank(
        None, stored(folder, f"{name}-a", a), stored(folder, f"{name}-b", b), scale, (rows, columns)
    )
    a, b = a.double(), b.double()
    return source, scale * (b @ a), abs(scale) * (b.abs() @ a.abs())


@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [
        (331, 1501, 8),
        (1, 200_001, 3),
        (70_001, 3, 2),
        (37, 30_011, 5),
        (64, 4096, 16),
        (5, 1, 1),
        (3001, 1501, 4),
    ],
)
def test_products_are_exact_for_every_shape_and_slab(rows, columns, rank, tmp_path):
    source, oracle, magnitudes = low_rank(tmp_path, "p", rows, columns, rank)
    close(read(source, tmp_path), oracle, magnitudes, rank)


def test_a_weight_is_added_once_rounded_to_its_dtype(tmp_path):
    w = normal(331, 1501, dtype=torch.bfloat16)
    change, oracle, _ = low_rank(tmp_path, "p", 331, 1501, 8, dtype=torch.bfloat16)
    source = LowRank(stored(tmp_path, "w", w), change.a, change.b, change.scale, change.shape)
    exact = w.double() + oracle
    found = read(source, tmp_path, dtype="BF16")
    nearest = exact.float().bfloat16()
    differing = (found != nearest).double().mean()
    assert differing < 1e-4  # float32 decides otherwise only beside the middle of two
    torch.testing.assert_close(found.double(), exact, rtol=2.0**-8, atol=1e-6)


def test_products_in_float64_have_its_digits(tmp_path):
    w = normal(131, 1501).double()
    change, oracle, magnitudes = low_rank(tmp_path, "p", 131, 1501, 8, dtype=torch.float64)
    source = LowRank(stored(tmp_path, "w", w), change.a, change.b, change.scale, change.shape)
    found = read(source, tmp_path, dtype="F64")
    assert float((found - w - oracle).abs().max() / magnitudes.max()) < 1e-15


def test_changes_nest_and_sum_in_any_way(tmp_path):
    w = normal(331, 1501)
    one, first, size_one = low_rank(tmp_path, "1", 331, 1501, 4)
    two, second, size_two = low_rank(tmp_path, "2", 331, 1501, 9, scale=-1.5)
    weight = stored(tmp_path, "w", w)
    oracle, magnitudes = w.double() + first + second, w.abs() + size_one + size_two
    inner = LowRank(weight, one.a, one.b, one.scale, one.shape)
    nested = LowRank(inner, two.a, two.b, two.scale, two.shape)
    close(read(nested, tmp_path / "nested"), oracle, magnitudes, 9)
    summed = Sum(((1.0, weight), (1.0, one), (1.0, two)))
    assert torch.equal(read(summed, tmp_path / "sum"), read(nested, tmp_path / "again"))
    weighted = Sum(((1.0, weight), (-0.5, one), (1.0, Sum(((2.0, two), (1.0, one))))))
    oracle = w.double() + 0.5 * first + 2 * second
    close(read(weighted, tmp_path / "weighted"), oracle, w.abs() + 2 * size_one + 2 * size_two, 9)


def test_the_change_of_one_adapter_is_the_same_with_two_factors(tmp_path):
    change, oracle, magnitudes = low_rank(tmp_path, "p", 331, 1501, 4)
    source = Sum(((0.25, change), (0.5, change), (-0.75, change)))
    close(read(source, tmp_path), 0 * oracle, 2 * magnitudes, 4)


def test_a_sum_adds_scaled_terms_in_their_order(tmp_path):
    tensors = [normal(257, 1001, dtype=d) for d in (torch.bfloat16, torch.float32, torch.float16)]
    factors = (0.5, -2.0, 0.25)  # exact
    pairs = list(zip(factors, tensors, strict=True))
    terms = [(f, stored(tmp_path, f"t{i}", t)) for i, (f, t) in enumerate(pairs)]
    expected = reduce(torch.add, (f * t.float() for f, t in pairs))
    assert torch.equal(read(Sum(tuple(terms)), tmp_path), expected)
    one = Sum(((3.0, terms[1][1]),))
    assert torch.equal(read(one, tmp_path / "one"), 3 * tensors[1])


def test_columns_put_matrices_side_by_side(tmp_path):
    tensors = [normal(501, 700), normal(501, 1, dtype=torch.bfloat16), normal(501, 64)]
    source = Columns(tuple(stored(tmp_path, f"c{i}", t) for i, t in enumerate(tensors)))
    expected = torch.cat([t.float() for t in tensors], dim=1)
    assert torch.equal(read(source, tmp_path), expected)
    wide = [normal(3, BLOCK + 5), normal(3, 7)]
    source = Columns(tuple(stored(tmp_path, f"w{i}", t) for i, t in enumerate(wide)))
    assert torch.equal(read(source, tmp_path / "wide"), torch.cat(wide, dim=1))


@pytest.mark.parametrize("shape", [(501, 700), (700, 501), (3, 100_003), (100_003, 3), (1, 9)])
def test_transposed_turns_rows_into_columns(shape, tmp_path):
    x = normal(*shape)
    assert torch.equal(read(Transposed(stored(tmp_path, "x", x)), tmp_path), x.T.contiguous())


def test_factors_may_be_put_together_of_others(tmp_path):
    rows, columns = 257, 1001
    a1, a2, b = normal(4, columns), normal(columns, 3), normal(7, rows, dtype=torch.bfloat16)
    a = Concat((stored(tmp_path, "a1", a1), Transposed(stored(tmp_path, "a2", a2))))
    left = Transposed(stored(tmp_path, "b", b))
    source = LowRank(None, a, left, 0.5, (rows, columns))
    right = torch.cat([a1, a2.T]).double()
    oracle = 0.5 * b.double().T @ right
    close(read(source, tmp_path), oracle, 0.5 * b.double().T.abs() @ right.abs(), 7)


def test_columns_far_apart_are_chosen(tmp_path):
    x = normal(4001, 96)
    order = (5, 95, -1, 0, 17, 5)
    source = Transposed(Rows(Transposed(stored(tmp_path, "x", x)), order))
    expected = torch.stack([x[:, i] if i >= 0 else torch.zeros(4001) for i in order], dim=1)
    assert torch.equal(read(source, tmp_path), expected)


def test_changes_of_many_experts_follow_one_another_and_one_is_kept(tmp_path):
    experts, rows, columns, rank = 12, 101, 301, 2
    w, a = normal(experts, rows, columns), normal(experts * rank, columns)
    b = normal(rows, rank * experts)
    weight, right, left = (stored(tmp_path, n, t) for n, t in (("w", w), ("a", a), ("b", b)))
    pieces = [
        LowRank(
            View(weight, i * rows * columns, (rows, columns)),
            View(right, i * rank * columns, (rank, columns)),
            Transposed(Rows(Transposed(left), tuple(range(i, rank * experts, experts)))),
            0.5,
            (rows, columns),
        )
        for i in range(experts)
    ]
    source = View(Concat(tuple(pieces)), 0, w.shape)
    each = torch.stack(
        [0.5 * b[:, i::experts].double() @ a[2 * i : 2 * i + 2].double() for i in range(experts)]
    )
    sizes = torch.stack(
        [b[:, i::experts].abs() @ a[2 * i : 2 * i + 2].abs() for i in range(experts)]
    )
    close(read(source, tmp_path), w.double() + each, w.abs() + 0.5 * sizes, rank)
    assert residency.kept_bytes(source, 4) == residency.kept_bytes(pieces[0], 4)


def test_a_large_left_factor_is_read_by_rows_with_the_same_bits(tmp_path, monkeypatch):
    change, _, _ = low_rank(tmp_path, "p", 40_000, 11, 6)
    kept = read(change, tmp_path / "kept")
    monkeypatch.setattr(residency, "KEPT", 1000)
    assert not residency.is_kept(change.b)
    assert torch.equal(kept, read(change, tmp_path / "by rows"))
    turned = Transposed(stored(tmp_path, "turned", normal(6, 40_000)))
    source = LowRank(None, change.a, turned, 1.0, change.shape)
    by_rows = read(source, tmp_path / "turned by rows")
    monkeypatch.undo()
    assert torch.equal(by_rows, read(source, tmp_path / "turned kept"))


def test_parts_of_a_product_are_the_whole_one_cut(tmp_path):
    change, _, _ = low_rank(tmp_path, "p", 300, 1501, 8)
    whole = read(change, tmp_path / "whole")
    view = View(change, 12_345, (100, 1001))
    expected = whole.flatten()[12_345 : 12_345 + 100_100].view(100, 1001)
    assert torch.equal(read(view, tmp_path / "view"), expected)
    order = (5, 4, 299, *range(17, 250), -1, 0)
    expected = torch.stack([whole[i] if i >= 0 else torch.zeros(1501) for i in order])
    assert torch.equal(read(Rows(change, order), tmp_path / "rows"), expected)
    turned = Transposed(change)
    assert torch.equal(read(turned, tmp_path / "turned"), whole.T.contiguous())


def test_nothing_of_rank_0_or_without_elements_is_read(tmp_path):
    w = normal(9, 4)
    none = Generated("zeros", (0, 4)), Generated("zeros", (9, 0))
    source = LowRank(stored(tmp_path, "w", w), *none, 1.0, (9, 4))
    assert torch.equal(read(source, tmp_path / "rank"), w)
    a, b = stored(tmp_path, "a", normal(2, 4)), stored(tmp_path, "b", normal(0, 2))
    assert read(LowRank(None, a, b, 1.0, (0, 4)), tmp_path / "empty").shape == (0, 4)


def norms_of(v, axis):
    return v.double().flatten(1).norm(dim=1) if axis == 0 else v.double().norm(dim=0)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(331, 1501), (40_000, 5), (3, 70_001), (7, 1)])
def test_normed_brings_vectors_to_their_lengths(axis, shape, tmp_path):
    v = normal(*shape, dtype=torch.bfloat16)
    m = normal(shape[axis]).abs()
    source = Normed(stored(tmp_path, "v", v), stored(tmp_path, "m", m), axis)
    factors = m.double() / norms_of(v, axis)
    oracle = v.double() * (factors[:, None] if axis == 0 else factors)
    close(read(source, tmp_path), oracle, oracle.abs())


def test_normed_takes_the_lengths_of_kernels_and_of_sums(tmp_path):
    w, m = normal(33, 17, 3, 3), normal(1, 33, 1, 1).abs()
    a, b = normal(4, 153), normal(33, 4)
    change = LowRank(None, stored(tmp_path, "a", a), stored(tmp_path, "b", b), 0.5, w.shape)
    total = Sum(((1.0, stored(tmp_path, "w", w)), (1.0, change)))
    source = Normed(total, stored(tmp_path, "m", m))
    v = w.double() + 0.5 * (b.double() @ a.double()).view(w.shape)
    oracle = v * (m.double().flatten() / norms_of(v, 0)).view(33, 1, 1, 1)
    found = read(source, tmp_path).double()
    # cancellation in w + b @ a is measured against its terms, here at most 30 of them of size 1
    assert float((found - oracle).abs().max()) < 30 * 2.0**-22


def test_a_vector_of_zeros_has_no_direction_and_stays_zeros(tmp_path):
    v = normal(5, 70)
    v[2] = 0
    source = Normed(stored(tmp_path, "v", v), stored(tmp_path, "m", torch.ones(5)))
    found = read(source, tmp_path)
    assert not found[2].any()
    assert found[[0, 1, 3, 4]].norm(dim=1).tolist() == pytest.approx([1.0] * 4)


def test_methods_with_scans_see_the_same_changes_in_every_slab(tmp_path):
    w = normal(331, 1501)
    base = stored(tmp_path, "w", w)
    changes = [low_rank(tmp_path, str(i), 331, 1501, 3 + i)[0] for i in range(2)]
    models = [LowRank(base, c.a, c.b, c.scale, c.shape) for c in changes]
    ties = Ties(density=PerModel((0.3, 0.3)), weight=PerModel((1.0, 1.0)))
    for name, method, inputs, deltas in (
        ("ties", ties, changes, (True, True)),
        ("slerp", Slerp(t=0.4), models[:1], ()),
    ):
        found = []
        for blocks, workers in SIZES:
            one = step(method, inputs, base=base, deltas=deltas)
            folder = tmp_path / f"{name}-{blocks}-{workers}"
            found.append(run([one], folder, blocks=blocks, workers=workers)["x"])
        assert all(torch.equal(found[0], other) for other in found[1:])
    apart = step(ties, models, base=base)
    formed = run([apart], tmp_path / "formed")["x"]
    given = step(ties, changes, base=base, deltas=(True, True))
    exact = run([given], tmp_path / "given")["x"]
    # w + d - w rounds d, and a trim at the k-th magnitude may keep another element
    assert float(((formed - exact).abs() > 1e-5).double().mean()) < 1e-4
