"""DARE: random pruning by numbers worked by hand, by its mean, and by oracles."""

from __future__ import annotations

from itertools import pairwise
from math import sqrt

import numpy as np
import pytest
import torch

from merge_kit.core.tensors import BLOCK
from merge_kit.errors import ParameterError
from merge_kit.methods import noise
from merge_kit.methods.base import PerModel
from merge_kit.methods.dare_linear import DareLinear
from merge_kit.methods.dare_ties import DareTies
from merge_kit.methods.task_arithmetic import TaskArithmetic
from merge_kit.methods.ties import Ties
from tests.engine.handmade import run, step, stored
from tests.methods.slabs import slab_of


def linear(weights, densities, **more) -> DareLinear:
    return DareLinear(weight=PerModel(weights), density=PerModel(densities), **more)


def ties(weights, densities, **more) -> DareTies:
    return DareTies(weight=PerModel(weights), density=PerModel(densities), **more)


@pytest.fixture
def drawn(monkeypatch):
    """Replace the draws by numbers of the test: those below density * 65,536 are kept."""

    def draw(*rows):
        def draws(key, start, stop, bits=16):
            assert bits == 16
            return np.array(rows[key[2]], dtype=np.uint16)[start:stop]

        monkeypatch.setattr(noise, "draws", draws)

    return draw


def test_what_is_kept_is_divided_by_the_probability(drawn):
    drawn([0, 32_768, 32_767, 65_535])
    merged = linear([1.0], [0.5]).merge(slab_of([[1.0, 2.0, 3.0, 4.0]]), {})
    assert merged.tolist() == [2.0, 0.0, 6.0, 0.0]


def test_weights_lambda_and_base_apply_to_what_is_kept(drawn):
    drawn([0, 40_000], [40_000, 0])
    slab = slab_of([[1.0, 1.0], [8.0, 8.0]], torch.tensor([100.0, 200.0]))
    merged = linear([3.0, -1.0], [0.5, 0.25], lambda_=0.5).merge(slab, {})
    assert merged.tolist() == [100 + 0.5 * 3 * 2, 200 - 0.5 * 8 * 4]


def test_without_rescaling_what_is_kept_stays_as_it_is(drawn):
    drawn([0, 65_535])
    merged = linear([1.0], [0.5], rescale=False).merge(slab_of([[3.0, 5.0]]), {})
    assert merged.tolist() == [3.0, 0.0]


def test_normalize_divides_by_the_sum_of_the_weights(drawn):
    drawn([0], [0])
    merged = linear([1.0, 3.0], [0.5, 0.5], normalize=True).merge(slab_of([[4.0], [8.0]]), {})
    assert merged.tolist() == [(4 * 2 + 3 * 8 * 2) / 4]


def test_the_probability_is_that_of_the_draws_not_the_density(drawn):
    drawn([6_553, 6_554])
    merged = linear([1.0], [0.1]).merge(slab_of([[1.0, 1.0]]), {})
    assert merged.tolist() == [pytest.approx(65_536 / 6_554, rel=2**-23), 0.0]


def mean(method, deltas, seeds=4000):
    total = torch.zeros(len(deltas), dtype=torch.float64)
    for seed in range(seeds):
        total += method.merge(slab_of([deltas], seed=seed), {})
    return total / seeds


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_the_mean_over_4000_seeds_is_the_task_vector(density):
    """An element d has the deviation |d| sqrt((1 - p) / p)."""
    deltas = torch.randn(40, generator=torch.Generator().manual_seed(1))
    sigma = deltas.abs() * sqrt((1 - density) / density / 4000)
    assert torch.all((mean(linear([1.0], [density]), deltas) - deltas).abs() < 5 * sigma)


def test_elements_of_very_different_sizes_keep_their_mean():
    """Matching the L1 norm would give about [74, 146, 296, 526]."""
    deltas = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    found = mean(linear([1.0], [0.5]), deltas)
    assert torch.all((found - deltas).abs() < 5 * deltas / sqrt(4000))


@pytest.mark.parametrize("density", [1e-6, 1 - 1e-6])
def test_densities_close_to_0_and_1(density):
    """Of n ones pn are kept, with a deviation of sqrt(n p (1 - p)), and become 1/p."""
    count = 2**22
    merged = linear([1.0], [density]).merge(slab_of([torch.ones(count)]), {})
    kept = int(merged.count_nonzero())
    assert abs(kept - density * count) < 5 * sqrt(count * density * (1 - density)) + 1
    if kept:
        assert float(merged.max()) == pytest.approx(1 / density, rel=1e-3)


def test_density_0_keeps_nothing_and_divides_by_nothing():
    base = torch.tensor([5.0, -6.0])
    merged = linear([1.0, 2.0], [0.0, 0.0]).merge(slab_of([[1.0, 2.0], [3.0, 4.0]], base), {})
    assert torch.equal(merged, base)


def test_density_1_is_task_arithmetic_without_draws(monkeypatch):
    monkeypatch.setattr(noise, "draws", None)
    deltas, base = torch.randn(2, 1000), torch.randn(1000)
    options = {"normalize": True, "lambda_": 0.7}
    plain = TaskArithmetic(weight=PerModel((0.3, 0.9)), **options)
    wanted = plain.merge(slab_of(deltas, base), {})
    for method in (
        linear([0.3, 0.9], [1.0, 1.0], **options),
        DareLinear(weight=PerModel((0.3, 0.9)), **options),  # the default
    ):
        assert torch.equal(method.merge(slab_of(deltas, base), {}), wanted)


def test_masks_do_not_depend_on_slabs_or_on_other_models():
    size = 2 * BLOCK + 77
    deltas = torch.randn(2, size)
    whole = linear([1.0, 1.0], [0.3, 0.3]).merge(slab_of(deltas), {})
    cuts = [0, BLOCK, BLOCK + 1, size - 3, size]
    parts = [
        linear([1.0, 1.0], [0.3, 0.3]).merge(slab_of(deltas[:, a:b], shape=(size,), offset=a), {})
        for a, b in pairwise(cuts)
    ]
    assert torch.equal(torch.cat(parts), whole)
    first = linear([1.0], [0.3]).merge(slab_of(deltas[:1]), {})
    with_nothing = linear([1.0, 1.0], [0.3, 0.0]).merge(slab_of(deltas), {})
    assert torch.equal(first, with_nothing)


@pytest.mark.parametrize("count", [2, 8])
def test_slabs_and_threads_change_no_bit(tmp_path, count):
    base, *models = (torch.randn(3, BLOCK + 13) for _ in range(count + 1))
    ground = stored(tmp_path, "base", base)
    sources = [stored(tmp_path, f"m{i}", m) for i, m in enumerate(models)]
    densities = [0.3, 0.01] * (count // 2)
    method = linear([0.5 + i / count for i in range(count)], densities)
    one = step(method, sources, base=ground, compute="F64" if count > 4 else None)
    results = [
        run([one], tmp_path / f"{b}{w}", blocks=b, workers=w)["x"]
        for b, w in ((1, 1), (3, 2), (2, 2))
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert not torch.equal(results[0], base)


def oracle(weights, densities, deltas, base, factor=1.0):
    """DARE by its equation, in float64; masks alone are taken from the package."""
    total, mass = base.double().clone(), base.double().abs()
    for i, (w, p, delta) in enumerate(zip(weights, densities, deltas, strict=True)):
        mask = torch.from_numpy(noise.kept((0, "dare", i, "x"), p, 0, len(base))).double()
        term = factor * w * mask * delta.double() / noise.probability(p)
        total, mass = total + term, mass + term.abs()
    return total, mass


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_within_law_4_of_the_oracle(count, dtype):
    generator = torch.Generator().manual_seed(count)
    size = BLOCK + 9
    base = torch.randn(size, generator=generator, dtype=dtype)
    deltas = [torch.randn(size, generator=generator, dtype=dtype) for _ in range(count)]
    weights, densities = [0.3, -0.8, 1.7, 0.1][:count], [0.1, 0.5, 0.001, 0.9][:count]
    method = linear(weights, densities, lambda_=0.7)
    merged = method.merge(slab_of(deltas, base), {})
    assert merged.dtype == dtype
    wanted, mass = oracle(weights, densities, deltas, base, 0.7)
    ulp = 2.0**-22 if dtype == torch.float32 else 2.0**-51
    assert torch.all((merged.double() - wanted).abs() <= ulp * method.error_factor * mass)


@pytest.mark.parametrize("density", [-0.1, 1.5, 20.0, float("nan"), float("inf")])
@pytest.mark.parametrize("method", [DareLinear, DareTies])
def test_a_density_outside_of_0_and_1_is_an_error(method, density):
    with pytest.raises(ParameterError, match=r"density is .*expected a number in \[0, 1\]") as e:
        method(weight=PerModel((1.0, 1.0)), density=PerModel((0.5, density)))
    assert e.value.parameter == "density"


def test_weights_that_cancel_cannot_be_normalised():
    with pytest.raises(ParameterError, match="weight"):
        linear([1.0, -1.0], [0.5, 0.5], normalize=True)
    base = torch.ones(3)
    none = linear([0.0, 0.0], [0.5, 0.5], normalize=True)
    assert torch.equal(none.merge(slab_of(torch.ones(2, 3), base), {}), base)


@pytest.mark.parametrize("method", [linear, ties])
def test_nan_is_not_dropped(method):
    """A mask of zeros would hide it; the engine finds it in the result."""
    broken = torch.full((200,), torch.nan)
    assert method([1.0], [0.1]).merge(slab_of([broken]), {}).isnan().all()
    for large in (torch.inf, 3e38):  # without a warning
        merged = method([1.0], [0.1]).merge(slab_of([torch.full((200,), large)]), {})
        assert not merged.isfinite().all()


def test_what_is_kept_votes_by_weight_and_size(drawn):
    """What is kept is doubled: [2, 0, -2, 8, 0] and [-16, -16, 16, -16, 0]."""
    drawn([0, 65_535, 0, 0, 65_535], [0, 0, 0, 0, 65_535])
    deltas = [[1.0, 5.0, -1.0, 4.0, 7.0], [-8.0, -8.0, 8.0, -8.0, 9.0]]
    slab = slab_of(deltas, torch.full((5,), 100.0))
    merged = ties([1.0, 1.0], [0.5, 0.5]).merge(slab, {})
    assert merged.tolist() == [84.0, 84.0, 116.0, 84.0, 100.0]


def test_those_that_agree_are_summed_or_averaged_by_their_weights(drawn):
    drawn([0, 0, 0], [0, 0, 65_535])
    deltas = [[1.0, 1.0, 1.0], [2.0, -2.0, 2.0]]
    summed = ties([3.0, 1.0], [0.5, 0.5]).merge(slab_of(deltas), {})
    assert summed.tolist() == [3 * 2 + 4, 3 * 2, 3 * 2]
    averaged = ties([3.0, 1.0], [0.5, 0.5], normalize=True, lambda_=0.5).merge(slab_of(deltas), {})
    assert averaged.tolist() == [0.5 * (6 + 4) / 4, 0.5 * 2, 0.5 * 2]


def test_a_negative_weight_removes_what_it_alone_has(drawn):
    drawn([0], [65_535])
    merged = ties([-1.0, 2.0], [0.5, 0.5], normalize=True).merge(slab_of([[3.0], [5.0]]), {})
    assert merged.tolist() == [-6.0]


def test_dare_ties_keeps_what_dare_linear_keeps():
    deltas = torch.randn(1, 1000)
    one = ties([1.0], [0.3]).merge(slab_of(deltas), {})
    assert torch.equal(one, linear([1.0], [0.3]).merge(slab_of(deltas), {}))


@pytest.mark.parametrize("density", [0.1, 0.9])
def test_the_mean_of_one_model_under_dare_ties_is_its_task_vector(density):
    deltas = torch.randn(40, generator=torch.Generator().manual_seed(1))
    sigma = deltas.abs() * sqrt((1 - density) / density / 4000)
    found = mean(ties([1.0], [density], normalize=True), deltas)
    assert torch.all((found - deltas).abs() < 5 * sigma)


def pruned(deltas, densities, name):
    """Return the deltas as DARE leaves them, in float64; masks are taken from the package."""
    rows = []
    for i, (p, delta) in enumerate(zip(densities, deltas, strict=True)):
        kept = noise.kept((0, "dare", i, name), p, 0, delta.numel())
        mask = torch.from_numpy(kept).double().view(delta.shape)
        rows.append(mask * delta.double() / noise.probability(p))
    return rows


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_dare_ties_within_law_4_of_the_oracle(count, normalize):
    generator = torch.Generator().manual_seed(count)
    size = 2 * BLOCK + 9
    base = torch.randn(size, generator=generator)
    deltas = [torch.randn(size, generator=generator) for _ in range(count)]
    weights, densities = [0.3, -0.8, 1.7, 0.1][:count], [0.3, 0.5, 0.9, 1.0][:count]
    method = ties(weights, densities, lambda_=0.7, normalize=normalize)
    merged = method.merge(slab_of(deltas, base), {})
    rows = [w * r for w, r in zip(weights, pruned(deltas, densities, "x"), strict=True)]
    total = sum(rows)
    sign = torch.where(total >= 0, 1.0, -1.0)
    agree = [(row * sign > 0).double() for row in rows]
    divisor = sum(abs(w) * a for w, a in zip(weights, agree, strict=True)) if normalize else 1.0
    divisor = torch.as_tensor(divisor).clamp_min(1e-9)
    wanted = base.double() + 0.7 * sum(a * r for a, r in zip(agree, rows, strict=True)) / divisor
    mass = (
        base.double().abs() + sum(a * r.abs() for a, r in zip(agree, rows, strict=True)) / divisor
    )
    close_call = total.abs() < 2.0**-20 * sum(row.abs() for row in rows)  # either sign will do
    assert close_call.double().mean() < 0.2
    error = torch.where(close_call & (total != 0), 0.0, (merged.double() - wanted).abs())
    assert torch.all(error <= 2.0**-22 * method.error_factor * mass)


def largest(rows, share):
    """Return each row with its int(share * n) largest elements, of equal ones the first."""
    kept = []
    for row in rows:
        order = np.argsort(-row.abs().numpy(), kind="stable")[: int(share * len(row))]
        mask = torch.zeros_like(row)
        mask[order] = 1
        kept.append(row * mask)
    return kept


@pytest.mark.parametrize(("density", "share"), [(0.5, 0.2), (0.1, 0.3), (1.0, 0.2)])
def test_variant_paper_prunes_then_does_all_of_ties_over_the_model(tmp_path, density, share):
    """Two tensors of different scale; the trim of the second case finds fewer than it may keep."""
    generator = torch.Generator().manual_seed(5)
    shapes, scales = {"a": (40, 50), "b": (BLOCK + 700,)}, {"a": 1.0, "b": 0.2}
    base = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    models = [
        {n: base[n] + scales[n] * torch.randn(s, generator=generator) for n, s in shapes.items()}
        for _ in range(3)
    ]
    densities, weights = [density] * 3, [1.0, 0.5, 1.5]
    method = ties(weights, densities, variant="paper", ties_density=share, lambda_=0.7)
    steps = [
        step(
            method,
            [stored(tmp_path, f"{n}{i}", m[n]) for i, m in enumerate(models)],
            base=stored(tmp_path, f"{n}-base", base[n]),
            name=n,
        )
        for n in shapes
    ]
    found = run(steps, tmp_path / "out", blocks=1)
    again = run(steps, tmp_path / "again", blocks=2, workers=1)
    assert all(torch.equal(found[n], again[n]) for n in shapes)

    flat = {n: pruned([m[n] - base[n] for m in models], densities, n) for n in shapes}
    whole = [torch.cat([flat[n][i].flatten() for n in shapes]) for i in range(3)]
    if density < share:
        assert all(int(row.count_nonzero()) < share * len(row) for row in whole)
    rows = largest(whole, share)
    vote = torch.sign(sum(rows))
    majority = 1.0 if float(vote.sum()) > 0 else -1.0
    vote = torch.where(vote == 0, majority, vote)
    agree = [(row * vote > 0).double() for row in rows]
    total = sum(w * a * r for w, a, r in zip(weights, agree, rows, strict=True))
    merged = 0.7 * total / sum(agree).clamp_min(1)
    wanted = torch.cat([base[n].flatten() for n in shapes]).double() + merged
    result = torch.cat([found[n].flatten() for n in shapes]).double()
    wrong = (result - wanted).abs() > 1e-5 * (1 + wanted.abs())
    assert wrong.sum() <= 3  # a sum so close to 0 that float32 rounds it over


def test_variant_paper_without_draws_is_ties():
    for share in (0.0, 0.2, 1.0):
        method = DareTies(weight=PerModel((1.0, 2.0)), ties_density=share, variant="paper")
        plain = Ties(weight=PerModel((1.0, 2.0)), density=PerModel((share, share)), variant="paper")
        ours, theirs = method.scans(), plain.scans()
        assert [(s.name, s.reduction, s.uses) for s in ours] == [
            (s.name, s.reduction, s.uses) for s in theirs
        ]
        assert all(scan.scope == "model" for scan in ours)


def test_a_scan_does_not_overwrite_the_slab():
    method = ties([1.0, 1.0], [0.5, 0.5], variant="paper")
    slab = slab_of(torch.ones(2, 100))
    (cuts, _) = method.scans()
    rows = cuts.of(slab, {})
    assert set(torch.stack(list(rows)).unique().tolist()) == {0.0, 2.0}
    assert torch.equal(slab.deltas, torch.ones(2, 100))


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_of_the_trim_outside_of_0_and_1_is_an_error(share):
    with pytest.raises(ParameterError, match=r"ties_density is .*expected a number in \[0, 1\]"):
        ties([1.0], [0.5], ties_density=share)
