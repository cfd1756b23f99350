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
from merge_kit.methods.task_arithmetic import TaskArithmetic
from tests.engine.handmade import run, step, stored
from tests.methods.slabs import slab_of


def linear(weights, densities, **more) -> DareLinear:
    return DareLinear(weight=PerModel(weights), density=PerModel(densities), **more)


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
@pytest.mark.parametrize("method", [DareLinear])
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


def test_nan_is_not_dropped():
    """A mask of zeros would hide it; the engine finds it in the result."""
    broken = torch.full((200,), torch.nan)
    assert linear([1.0], [0.1]).merge(slab_of([broken]), {}).isnan().all()
