"""Routers of zeros and of random numbers: how they are distributed, and what they depend on."""

from __future__ import annotations

from math import sqrt

import pytest
import torch

from tests.structures import prompted
from tests.structures.prompted import HIDDEN, LAYERS

EXPERTS = 2_000
"""Many, so that means are sharp."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return prompted.save("qwen2", tmp_path_factory.mktemp("base") / "qwen2")


def routers(base, router, **options):
    return prompted.read(*prompted.planned(base, router, [None] * EXPERTS, **options))


def joined(rows):
    return torch.cat([rows[layer] for layer in sorted(rows)]).double()


def test_zero_routers_are_zero(base):
    rows, shared = routers(base, "zero", with_shared=True)
    assert {tuple(r.shape) for r in rows.values()} == {(EXPERTS, HIDDEN)}
    assert {tuple(r.shape) for r in shared.values()} == {(1, HIDDEN)}
    assert not any(one.any() for one in (*rows.values(), *shared.values()))


@pytest.mark.parametrize(("scale", "deviation"), [(None, 0.02), (1.0, 1.0)])
def test_random_routers_are_normal(scale, deviation, base):
    """n = 128,000: a mean deviates by s / sqrt(n), a deviation by s / sqrt(2 n)."""
    rows, shared = routers(base, "random", scale=scale, with_shared=True)
    drawn = joined(rows)
    count = drawn.numel()
    assert count == EXPERTS * HIDDEN * LAYERS
    assert abs(drawn.mean()) < 5 * deviation / sqrt(count)
    assert drawn.std() == pytest.approx(deviation, abs=5 * deviation / sqrt(2 * count))
    inside = float((drawn.abs() < deviation).double().mean())
    assert inside == pytest.approx(0.6827, abs=5 * sqrt(0.6827 * 0.3173 / count))
    assert all(one.any() and one.abs().max() < 6 * deviation for one in shared.values())


@pytest.mark.parametrize(("scale", "half"), [(None, 0.25), (0.5, 0.5)])
def test_uniform_routers_fill_their_range(scale, half, base):
    """Half the width is 1 / sqrt(16) by default; squares have mean half^2 / 3."""
    rows, shared = routers(base, "uniform_random", scale=scale, with_shared=True)
    drawn = joined(rows)
    count = drawn.numel()
    assert half * 0.999 < drawn.abs().max() < half
    assert abs(drawn.mean()) < 5 * half / sqrt(3 * count)
    square = float(drawn.square().mean())
    assert square == pytest.approx(half**2 / 3, abs=5 * half**2 * sqrt(4 / 45 / count))
    assert all(one.any() and one.abs().max() < half for one in shared.values())


@pytest.mark.parametrize("router", ["random", "uniform_random"])
def test_each_layer_and_each_seed_draws_its_own(router, base):
    rows, shared = routers(base, router, with_shared=True)
    again, _ = routers(base, router)
    other, _ = routers(base, router, seed=1)
    for layer in range(LAYERS):
        assert torch.equal(rows[layer], again[layer])
        assert not torch.equal(rows[layer], other[layer])
        assert not torch.equal(rows[layer], rows[(layer + 1) % LAYERS])
        assert not torch.equal(rows[layer][:1], shared[layer])


def test_a_layer_draws_the_same_whichever_others_are_sparse(base):
    every, _ = routers(base, "random")
    some, _ = routers(base, "random", layers=(1, 3))
    assert sorted(some) == [1, 3]
    assert all(torch.equal(some[layer], every[layer]) for layer in some)


def test_prompts_without_effect_are_said_to_be(base):
    site, _ = prompted.planned(base, "random")
    assert site.findings.notes == ("prompts have no effect with router: random",)
