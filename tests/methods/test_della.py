"""DELLA: random pruning by rank, by numbers worked by hand, by its mean, and by oracles."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
import torch

from merge_kit.core.tensors import BLOCK
from merge_kit.errors import ParameterError
from merge_kit.methods import noise
from merge_kit.methods.base import PerModel
from merge_kit.methods.della import Della
from merge_kit.methods.della_linear import DellaLinear
from merge_kit.methods.rank_dropping import chances
from merge_kit.methods.task_arithmetic import TaskArithmetic
from tests.engine.handmade import run, step, stored
from tests.methods.slabs import slab_of


def linear(weights, densities, epsilons, **more) -> DellaLinear:
    return DellaLinear(
        weight=PerModel(weights), density=PerModel(densities), epsilon=PerModel(epsilons), **more
    )


def voted(weights, densities, epsilons, **more) -> Della:
    return Della(
        weight=PerModel(weights), density=PerModel(densities), epsilon=PerModel(epsilons), **more
    )


def test_probabilities_rise_with_the_rank_over_twice_epsilon():
    assert chances(0.5, 0.2, 5, "mergekit") == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7])


def test_the_papers_epsilon_is_the_whole_window_in_steps_of_one_in_c():
    assert chances(0.5, 0.4, 4, "paper") == pytest.approx([0.4, 0.5, 0.6, 0.7])


@pytest.mark.parametrize("variant", ["mergekit", "paper"])
def test_a_row_of_one_element_has_the_density(variant):
    assert chances(0.3, 0.2, 1, variant).tolist() == [0.3]


@pytest.fixture
def drawn(monkeypatch):
    """Replace the draws by numbers of the test, in the order of the ranks."""

    def draw(*rows):
        def draws(key, start, stop, bits=16):
            assert bits == 16
            return np.array(rows[key[2]], dtype=np.uint16)[start:stop]

        monkeypatch.setattr(noise, "draws", draws)

    return draw


def test_each_element_is_divided_by_the_probability_of_its_rank(drawn):
    """Ranks 2, 0, 1 have probabilities 3/4, 1/4, 1/2: thresholds 49152, 16384, 32768."""
    drawn([16_383, 32_768, 49_151])
    merged = linear([1.0], [0.5], [0.25]).merge(slab_of([[-9.0, 1.0, 2.0]]), {})
    assert merged.tolist() == [-12.0, 4.0, 0.0]


def test_rows_are_ranked_by_themselves(drawn):
    drawn([0, 0, 0, 0])
    slab = slab_of([[1.0, -2.0, 80.0, 4.0]], shape=(2, 2))
    merged = linear([3.0], [0.5], [0.25]).merge(slab, {})
    assert merged.tolist() == pytest.approx([12, -8, 320, 48])


def test_without_rescaling_what_is_kept_stays_as_it_is(drawn):
    drawn([16_384, 0, 0])
    merged = linear([1.0], [0.5], [0.25], rescale=False).merge(slab_of([[-9.0, 1.0, 2.0]]), {})
    assert merged.tolist() == [-9.0, 0.0, 2.0]


def test_weights_are_summed_and_normalised(drawn):
    drawn([0], [0])
    base = torch.tensor([10.0])
    slab = slab_of([[4.0], [8.0]], base)
    merged = linear([1.0, 3.0], [0.5, 0.5], [0.1, 0.1], normalize=True, lambda_=2.0)
    assert merged.merge(slab, {}).tolist() == [10 + 2 * (4 * 2 + 3 * 8 * 2) / 4]


@pytest.mark.parametrize("variant", ["mergekit", "paper"])
def test_the_mean_over_4000_seeds_is_the_task_vector_and_ranks_have_their_probability(variant):
    deltas = torch.tensor([[3.0, -1.0, 200.0, 0.5], [-7.0, 7.0, 8.0, 1e-3]])
    ranks = torch.tensor([2, 1, 3, 0, 1, 2, 3, 0])
    method = linear([1.0], [0.5], [0.45], variant=variant)
    q = torch.from_numpy(chances(0.5, 0.45, 4, variant))[ranks]
    total, kept, seeds = torch.zeros(8, dtype=torch.float64), torch.zeros(8), 4000
    for seed in range(seeds):
        merged = method.merge(slab_of([deltas], shape=(2, 4), seed=seed), {})
        total += merged
        kept += merged != 0
    flat = deltas.flatten()
    assert torch.all((total / seeds - flat).abs() < 5 * flat.abs() * ((1 - q) / q / seeds).sqrt())
    assert torch.all((kept / seeds - q).abs() < 5 * (q * (1 - q) / seeds).sqrt())


@pytest.mark.parametrize("density", [1e-6, 1 - 1e-6])
def test_densities_close_to_0_and_1(density):
    rows, columns = 2048, 1024
    count = rows * columns
    method = linear([1.0], [density], [0.5e-6])
    merged = method.merge(slab_of([torch.ones(count)], shape=(rows, columns)), {})
    kept = int(merged.count_nonzero())
    assert abs(kept - density * count) < 5 * sqrt(count * density * (1 - density)) + 1
    assert torch.isfinite(merged).all()


def test_density_1_draws_nothing_and_density_0_keeps_nothing(monkeypatch):
    monkeypatch.setattr(noise, "draws", None)
    deltas, base = torch.randn(2, 60), torch.randn(60)
    for whole in (
        linear([0.3, 0.9], [1, 1], [0.15, 0.15]),
        DellaLinear(weight=PerModel((0.3, 0.9))),
    ):
        wanted = TaskArithmetic(weight=PerModel((0.3, 0.9))).merge(slab_of(deltas, base), {})
        assert torch.equal(whole.merge(slab_of(deltas, base), {}), wanted)
        assert whole.residency() == "element"
    nothing = linear([0.3, 0.9], [0, 0], [0.15, 0.15])
    assert torch.equal(nothing.merge(slab_of(deltas, base), {}), base)
    assert linear([0.3], [0.5], [0.15]).residency() == "row"


def test_draws_belong_to_seed_model_and_tensor():
    deltas = torch.ones(1, 4096)
    method = linear([1.0], [0.5], [0.0])
    one = method.merge(slab_of(deltas, name="a"), {})
    assert torch.equal(one, method.merge(slab_of(deltas, name="a"), {}))
    again = linear([1.0, 1.0], [0.5, 0.0], [0.0, 0.0])
    assert torch.equal(one, again.merge(slab_of([deltas, deltas], name="a"), {}))
    second = linear([1.0, 1.0], [0.0, 0.5], [0.0, 0.0])
    others = [
        method.merge(slab_of(deltas, name="b"), {}),
        method.merge(slab_of(deltas, name="a", seed=1), {}),
        second.merge(slab_of([deltas, deltas], name="a"), {}),
    ]
    for other in others:  # of 4096 a half is the same by chance, with a deviation of 32
        assert abs(float((one == other).sum()) - 2048) < 5 * 32


@pytest.mark.parametrize("count", [2, 8])
def test_slabs_and_threads_change_no_bit(tmp_path, count):
    base, *models = (torch.randn(60, 5_003) for _ in range(count + 1))
    ground = stored(tmp_path, "base", base)
    sources = [stored(tmp_path, f"m{i}", m) for i, m in enumerate(models)]
    half = count // 2
    method = linear([0.5 + i / count for i in range(count)], [0.3, 0.6] * half, [0.1, 0.2] * half)
    one = step(method, sources, base=ground, compute="F64" if count > 4 else None)
    results = [
        run([one], tmp_path / f"{b}{w}", blocks=b, workers=w)["x"]
        for b, w in ((1, 1), (3, 2), (2, 2))
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert not torch.equal(results[0], base)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0), (4, 1), (2, 3, 4)])
def test_every_shape_is_merged(shape):
    deltas = torch.ones(1, *shape)
    merged = linear([1.0], [0.5], [0.15]).merge(slab_of(deltas, shape=shape), {})
    assert merged.numel() == deltas.numel()
    assert torch.isfinite(merged).all()


def pruned(densities, epsilons, deltas, variant):
    """Yield task vectors as the equation leaves them; draws alone are taken from the package."""
    rows, columns = deltas[0].shape
    for i, (p, eps) in enumerate(zip(densities, epsilons, strict=True)):
        delta = deltas[i].double()
        r = torch.from_numpy(
            np.argsort(np.argsort(delta.abs().numpy(), axis=1, kind="stable"), axis=1)
        ).double()
        q = p - eps + 2 * eps * r / (columns - 1)
        if variant == "paper":
            q = p + eps / 2 - eps / columns * (columns - 1 - r)
        bits = 32 if float(q.min()) < 1 / 256 or float(q.max()) > 255 / 256 else 16
        q = (q * 2**bits).round() / 2**bits
        drawn = noise.draws((0, "della", i, "x"), 0, rows * columns, bits).astype(np.float64)
        by_rank = torch.from_numpy(drawn).view(rows, columns) / 2**bits
        kept = (torch.gather(by_rank, 1, r.long()) < q).double()
        yield kept * delta / q


@pytest.mark.parametrize("variant", ["mergekit", "paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(700, 97), (3, 30_011), (1, BLOCK + 5)])
def test_within_law_4_of_the_oracle(shape, dtype, variant):
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(shape, generator=generator, dtype=dtype)
    deltas = [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2)]
    deltas[1] = (deltas[1] * 4).round()  # many of equal magnitude
    values = [0.3, -1.8], [0.3, 0.5], [0.125, 0.499]
    method = linear(*values, variant=variant)
    merged = method.merge(slab_of(deltas, base.flatten(), shape=shape), {})
    assert merged.dtype == dtype
    rows = [w * row for w, row in zip(values[0], pruned(*values[1:], deltas, variant), strict=True)]
    mass = base.double().abs() + sum(row.abs() for row in rows)
    error = (merged.double() - (base.double() + sum(rows)).flatten()).abs()
    ulp = 2.0**-22 if dtype == torch.float32 else 2.0**-51
    assert torch.all(error <= ulp * method.error_factor * mass.flatten())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("variant", ["mergekit", "paper"])
def test_della_within_law_4_of_the_oracle(variant, normalize):
    generator = torch.Generator().manual_seed(2)
    base, *deltas = (torch.randn(700, 97, generator=generator) for _ in range(4))
    values = [0.3, -1.8, 1.0], [0.3, 0.5, 0.7], [0.125, 0.499, 0.2]
    method = voted(*values, variant=variant, normalize=normalize, lambda_=0.7)
    merged = method.merge(slab_of(deltas, base.flatten(), shape=base.shape), {})
    rows = [w * row for w, row in zip(values[0], pruned(*values[1:], deltas, variant), strict=True)]
    total = sum(rows)
    sign = torch.where(total >= 0, 1.0, -1.0)
    agree = [(row * sign > 0).double() for row in rows]
    shares = sum(abs(w) * a for w, a in zip(values[0], agree, strict=True))
    divisor = shares.clamp_min(0.1) if normalize else 1.0
    wanted = base.double() + 0.7 * sum(a * r for a, r in zip(agree, rows, strict=True)) / divisor
    mass = base.abs() + sum(a * r.abs() for a, r in zip(agree, rows, strict=True)) / divisor
    close_call = total.abs() < 2.0**-20 * sum(row.abs() for row in rows)  # either sign will do
    assert close_call.double().mean() < 0.01
    error = (merged.double().view(base.shape) - wanted).abs()
    allowed = 2.0**-22 * method.error_factor * mass
    assert torch.all((error <= allowed) | close_call)


def test_what_is_kept_votes_by_weight_and_size(drawn):
    """In rows of one element each what is kept is doubled: [2, 0, -2] and [-16, -16, 16]."""
    drawn([0, 65_535, 0], [0, 0, 0])
    deltas = [[1.0, 5.0, -1.0], [-8.0, -8.0, 8.0]]
    base = torch.full((3,), 100.0)
    slab = slab_of(deltas, base, shape=(3, 1))
    averaged = voted([1.0, 2.0], [0.5, 0.5], [0.1, 0.1], lambda_=0.5)
    assert averaged.merge(slab, {}).tolist() == [92.0, 92.0, 108.0]
    slab = slab_of(deltas, base, shape=(3, 1))
    summed = voted([1.0, 2.0], [0.5, 0.5], [0.1, 0.1], normalize=False)
    assert summed.merge(slab, {}).tolist() == [68.0, 68.0, 132.0]


def test_della_keeps_what_della_linear_keeps():
    deltas = torch.randn(1, 1000)
    one = voted([1.0], [0.3], [0.1]).merge(slab_of(deltas), {})
    assert torch.equal(one, linear([1.0], [0.3], [0.1]).merge(slab_of(deltas), {}))


def test_a_negative_weight_removes_what_it_alone_has():
    slab = slab_of([[3.0], [5.0]])
    merged = voted([-1.0, 2.0], [1.0, 0.0], [0.1, 0.1]).merge(slab, {})
    assert merged.tolist() == [-3.0]


@pytest.mark.parametrize("method", [linear, voted])
def test_what_is_not_finite_is_not_dropped(method):
    """A mask of zeros would hide it; the engine finds it in the result."""
    for large in (torch.nan, torch.inf, 3e38):  # without a warning
        slab = slab_of([torch.full((200,), large)])
        merged = method([1.0], [0.1], [0.05]).merge(slab, {})
        assert not merged.isfinite().all()


METHODS = [DellaLinear, Della]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("density", [-0.1, 1.5, float("nan")])
def test_a_density_outside_of_0_and_1_is_an_error(method, density):
    with pytest.raises(ParameterError, match=r"density is .*expected a number in \[0, 1\]"):
        method(weight=PerModel((1.0,)), density=PerModel((density,)))


@pytest.mark.parametrize("method", METHODS)
def test_a_window_that_reaches_0_or_1_is_an_error(method):
    for density in (0.1, 0.15, 0.85, 0.95):
        with pytest.raises(ParameterError, match=r"epsilon is 0\.15, and the probabilities") as e:
            method(weight=PerModel((1.0,)), density=PerModel((density,)))
        assert "must stay below" in e.value.hint
    method(weight=PerModel((1.0,)), density=PerModel((0.1,)), variant="paper")
    with pytest.raises(ParameterError, match=r"from -0.05 to 0.25.*between 0 and 1") as e:
        method(
            weight=PerModel((1.0,)),
            density=PerModel((0.1,)),
            epsilon=PerModel((0.3,)),
            variant="paper",
        )
    assert e.value.hint == "with density 0.1, epsilon must stay below 0.2"
    for density in (0.0, 1.0):
        method(weight=PerModel((1.0,)), density=PerModel((density,)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("epsilon", [-0.1, float("nan")])
def test_an_epsilon_below_0_is_an_error(method, epsilon):
    with pytest.raises(ParameterError, match=r"epsilon is .*at least 0"):
        method(weight=PerModel((1.0,)), density=PerModel((0.5,)), epsilon=PerModel((epsilon,)))


def test_weights_that_cancel_cannot_be_normalised():
    with pytest.raises(ParameterError, match="weight"):
        linear([1.0, -1.0], [0.5, 0.5], [0.1, 0.1], normalize=True)
    base = torch.ones(3)
    none = linear([0.0, 0.0], [0.5, 0.5], [0.1, 0.1], normalize=True)
    assert torch.equal(none.merge(slab_of(torch.ones(2, 3), base), {}), base)
