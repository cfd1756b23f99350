"""Changes that stand out: by hand, and against oracles in more digits than float64."""

from __future__ import annotations

from decimal import Decimal, localcontext
from math import inf, log

import numpy as np
import pytest
import torch

from merge_kit.methods.arcee_fusion import ArceeFusion
from merge_kit.methods.divergence import divergences, importance
from tests.engine.handmade import run, step, stored


def fused(folder, base, model, dtype="F32", **options):
    folder.mkdir(parents=True, exist_ok=True)
    sources = [stored(folder, "model", torch.as_tensor(model))]
    ground = stored(folder, "base", torch.as_tensor(base))
    one = step(ArceeFusion(), sources, base=ground, dtype=dtype)
    return run([one], folder / "out", **options)["x"]


def diverging(base, change):
    """Return the divergences of rows, with work space of their own."""
    return divergences(base.copy(), change.copy(), [np.empty(base.shape) for _ in range(3)])


def divergence(base, model):
    """Return sum(P log(P / Q)) of one row in fifty digits."""
    with localcontext() as context:
        context.prec = 50
        rows = [[Decimal(float(x)).exp() for x in row] for row in (model, base)]
        p, q = ([x / sum(row) + Decimal("1e-8") for x in row] for row in rows)
        return float(sum(a * (a / b).ln() for a, b in zip(p, q, strict=True)))


def test_only_changes_above_the_threshold_are_taken(tmp_path):
    """Rows (ln a, 0) over rows of zeros: softmax (a, 1) / (1 + a) against halves.

    ln a times the divergence is .0393, .1437, .2672, .8087 for a = 2, 3, 4, 9; the other four
    elements have 0. Of eight the indices 1, 3, 5 are Q1 = 0, the median 0, and Q3 = .1437, so the
    threshold is .2156.
    """
    model = torch.tensor([[log(a), 0.0] for a in (2, 3, 4, 9)])
    result = fused(tmp_path, torch.zeros(4, 2), model)
    assert result.tolist() == [[0.0, 0.0], [0.0, 0.0], model[2].tolist(), model[3].tolist()]


def test_the_importances_of_that_example():
    model = torch.tensor([log(2), 0.0, log(9), 0.0])
    found = importance(torch.zeros(4), model, 2)
    two = 2 / 3 * log(4 / 3) + 1 / 3 * log(2 / 3)
    nine = 9 / 10 * log(18 / 10) + 1 / 10 * log(2 / 10)
    assert found.tolist() == pytest.approx([log(2) * two, 0, log(9) * nine, 0], rel=1e-6)


@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-3, 0.3, 3.0])
def test_divergences_keep_their_digits_at_any_size(size):
    generator = np.random.default_rng(3)
    base = generator.normal(size=(4, 12)) * 0.02
    model = base + size * generator.normal(size=(4, 12))
    found = diverging(base, model - base)
    wanted = [divergence(b, m) for b, m in zip(base, model, strict=True)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-14 / size + 1e-12)
    assert min(wanted) > 0


def test_a_row_that_only_moves_does_not_diverge():
    base = np.random.default_rng(1).normal(size=(3, 50))
    assert diverging(base, np.full((3, 50), 0.3)).tolist() == [0, 0, 0]


def test_rows_far_apart_diverge_by_the_smoothing():
    """One-hot against another: 1 log(1e8) and 1e-8 log(1e-8), up to some 1e-8."""
    base, model = np.array([[0.0, 1000.0]]), np.array([[1000.0, 0.0]])
    assert diverging(base, model - base)[0] == pytest.approx(8 * log(10), rel=1e-6)


def test_a_row_has_the_same_bits_alone_and_among_others():
    generator = np.random.default_rng(2)
    for columns in (1, 2, 3, 5, 64, 129):
        base = generator.normal(size=(70, columns))
        model = base + generator.normal(size=(70, columns)) * generator.choice([1e-3, 1], (70, 1))
        together = diverging(base, model - base)
        for at in (0, 1, 33, 69):
            row = slice(at, at + 1)
            alone = diverging(base[row], (model - base)[row])
            assert alone[0] == together[at]


@pytest.mark.parametrize("shape", [(), (1,), (5, 1), (1, 1)])
def test_elements_that_are_rows_are_all_taken(tmp_path, shape):
    generator = torch.Generator().manual_seed(1)
    base, model = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    assert fused(tmp_path, base, model).equal(model)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_nothing_stays_nothing(tmp_path, shape):
    assert fused(tmp_path, torch.zeros(shape), torch.zeros(shape)).shape == shape


def test_equal_importances_are_all_taken(tmp_path):
    """Rows (1, -1) over zeros: every change is as important as any other."""
    model = torch.tensor([[1.0, -1.0]] * 5)
    assert fused(tmp_path, torch.zeros(5, 2), model).equal(model)


def test_few_changes_are_all_taken(tmp_path):
    """Three quarters of the importances and more are 0, and so is the threshold."""
    base = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    model = base.clone()
    model[3, 4:7] += 0.25
    assert fused(tmp_path, base, model).equal(model)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        (torch.float32, 1e-1),
        (torch.float32, 1e-5),
        (torch.bfloat16, 1e-1),
        (torch.bfloat16, 1e-3),
    ],
)
@pytest.mark.parametrize("shape", [(300, 257), (2, 40_001), (70_000,), (30, 3, 7)])
def test_the_formula_in_more_digits_takes_the_same(tmp_path, shape, kind, size):
    """Tensors larger than what a sample may hold too."""
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(shape, generator=generator) * 0.02
    model = base + size * torch.randn(shape, generator=generator)
    base, model = base.to(kind), model.to(kind)
    before, after = (t.double().numpy().astype(np.longdouble) for t in (base, model))
    p, q = (softmax(x) + np.longdouble(1e-8) for x in (after, before))
    ratio = (p - q) / q
    rows = np.sum(q * ((1 + ratio) * np.log1p(ratio) - ratio), axis=-1, keepdims=True)
    scores = np.abs(after - before) * rows
    first, median, third = (
        np.sort(scores, axis=None)[int(q * (scores.size - 1))] for q in (0.25, 0.5, 0.75)
    )
    threshold = median + 1.5 * (third - first)
    sure = np.abs(scores - threshold) > 1e-6 * threshold
    result = fused(tmp_path, base, model, {torch.float32: "F32", torch.bfloat16: "BF16"}[kind])
    wanted = torch.where(torch.from_numpy(scores >= threshold), model, base)
    assert sure.mean() > 0.999
    assert 0.02 < (scores >= threshold).mean() < 0.3
    assert result[torch.from_numpy(sure)].equal(wanted[torch.from_numpy(sure)])


def softmax(rows):
    shares = np.exp(rows - rows.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


def test_huge_numbers_stay_finite(tmp_path):
    base = torch.tensor([[1e38, -1e38, 0.0], [3e38, 3e38, -3e38]])
    result = fused(tmp_path, base, -base)
    assert float(result.double().abs().max()) < inf


def test_slab_size_and_threads_change_no_bit(tmp_path):
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(3000, 67, generator=generator).bfloat16()
    model = base + torch.randn(3000, 67, generator=generator).bfloat16() / 64
    results = [
        fused(tmp_path / f"{blocks}", base, model, blocks=blocks, workers=blocks)
        for blocks in (1, 2, 3)
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])
