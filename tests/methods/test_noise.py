"""Random numbers: the same for every cut into slabs, and as random as they should be."""

from __future__ import annotations

import threading
from itertools import pairwise
from math import sqrt

import numpy as np
import pytest
import torch

from merge_kit.core.tensors import BLOCK
from merge_kit.methods import noise

KEY = (7, "dare", 0, "layers.0.weight")


@pytest.mark.parametrize("bits", [16, 32])
def test_draws_are_the_same_for_every_cut(bits):
    whole = noise.draws(KEY, 0, 3 * BLOCK, bits)
    cuts = [0, 1, 15, 16, 17, 4_099, BLOCK, BLOCK + 5, 2 * BLOCK + 31, 3 * BLOCK]
    parts = [noise.draws(KEY, a, b, bits) for a, b in pairwise(cuts)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert noise.draws(KEY, 5, 5, bits).size == 0


@pytest.mark.parametrize("bits", [16, 32])
def test_far_elements_are_drawn_without_those_before_them(bits):
    far = 2**40 + 3
    drawn = noise.draws(KEY, far, far + 50, bits)
    assert np.array_equal(drawn[20:], noise.draws(KEY, far + 20, far + 50, bits))
    assert len(set(drawn.tolist())) > 40


def test_threads_that_draw_at_once_get_the_same_numbers():
    wanted = [noise.draws((i,), 0, BLOCK) for i in range(4)]
    found: dict[int, list[np.ndarray]] = {i: [] for i in range(4)}

    def draw(i):
        found[i] = [noise.draws((i,), 0, BLOCK) for _ in range(20)]

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(one, wanted[i]) for i in range(4) for one in found[i])


@pytest.mark.parametrize("bits", [16, 32])
def test_draws_are_uniform(bits):
    """256 bins of the high and of the low byte: chi-square has mean 255, deviation sqrt(510)."""
    drawn = noise.draws(KEY, 0, 2**18, bits)
    for byte in (drawn & 255, drawn >> (bits - 8)):
        counts = np.bincount(byte.astype(np.int64), minlength=256)
        square = float(((counts - 1024.0) ** 2 / 1024).sum())
        assert abs(square - 255) < 5 * sqrt(510)


def test_draws_of_neighbours_are_uncorrelated():
    drawn = noise.draws(KEY, 0, 2**18) / 2**16 - 0.5
    for distance in (1, 2, 3, 4, 16, 64, BLOCK):
        product = float((drawn[:-distance] * drawn[distance:]).sum())
        assert abs(product) < 5 * sqrt(2**18) / 12  # variance 1/12 each


@pytest.mark.parametrize(
    "other",
    [
        (8, "dare", 0, "layers.0.weight"),
        (7, "della", 0, "layers.0.weight"),
        (7, "dare", 1, "layers.0.weight"),
        (7, "dare", 0, "layers.1.weight"),
    ],
    ids=["seed", "method", "position", "tensor"],
)
def test_masks_of_other_seeds_methods_models_and_tensors_are_uncorrelated(other):
    """Of n elements both keep p^2 n, with a deviation of sqrt(n p^2 (1 - p^2))."""
    count, p = 2**18, 0.25
    both = int((noise.kept(KEY, p, 0, count) & noise.kept(other, p, 0, count)).sum())
    assert abs(both - p * p * count) < 5 * sqrt(count * p * p * (1 - p * p))


@pytest.mark.parametrize("density", [1e-6, 0.001, 0.1, 1 / 3, 0.5, 0.9, 0.999, 1 - 1e-6])
def test_the_share_that_is_kept_is_the_probability_that_is_told(density):
    count = 2**21
    mask, exact = noise.kept(KEY, density, 0, count), noise.probability(density)
    assert abs(exact / density - 1) < 2.0**-9
    assert abs((1 - exact) / (1 - density) - 1) < 2.0**-9
    assert abs(int(mask.sum()) - exact * count) < 5 * sqrt(count * exact * (1 - exact))


def test_density_0_keeps_nothing_and_1_everything():
    assert (noise.probability(0.0), noise.probability(1.0)) == (0.0, 1.0)
    assert not noise.kept(KEY, 0.0, 0, 100).any()
    assert noise.kept(KEY, 1.0, 0, 100).all()


def test_thresholds_worked_by_hand():
    assert noise.threshold(0.5) == (32_768, 16)
    assert noise.threshold(0.1) == (6_554, 16)  # 6553.6
    assert noise.threshold(2.0**-10) == (2**22, 32)
    assert noise.threshold(1e-12) == (1, 32)  # never nothing
    assert noise.threshold(1 - 1e-12) == (2**32 - 1, 32)  # never everything


def test_normal_numbers_are_the_same_for_every_cut():
    whole = noise.normal(KEY, 0, 2 * BLOCK)
    parts = [
        noise.normal(KEY, a, b) for a, b in ((0, 100), (100, BLOCK + 1), (BLOCK + 1, 2 * BLOCK))
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert abs(float(whole.double().mean())) < 5 / sqrt(2 * BLOCK)
    assert abs(float(whole.double().var()) - 1) < 5 * sqrt(2 / (2 * BLOCK))


def test_normal_numbers_are_spread_as_they_should_be():
    """Kolmogorov's distance stays below 2 / sqrt(n) but once in 1,500 seeds."""
    drawn = noise.normal(KEY, 0, 8 * BLOCK).double().sort().values
    below = torch.special.ndtr(drawn)
    ranks = (torch.arange(len(drawn), dtype=torch.float64) + 0.5) / len(drawn)
    assert float((below - ranks).abs().max()) < 2 / sqrt(len(drawn))
    assert float(drawn.abs().max()) > 4


@pytest.mark.parametrize("distance", [1, BLOCK // 2, BLOCK])
def test_normal_numbers_and_their_squares_are_uncorrelated(distance):
    drawn = noise.normal(KEY, 0, 8 * BLOCK).double()
    one, other = drawn[:-distance], drawn[distance:]
    assert abs(float((one * other).mean())) < 5 / sqrt(len(one))
    assert abs(float(((one**2 - 1) * (other**2 - 1)).mean())) < 5 * 2 / sqrt(len(one))


def test_uniform_numbers_are_the_same_for_every_cut():
    whole = noise.uniform(KEY, 0, 2 * BLOCK)
    cuts = [0, 1, 15, 4_099, BLOCK, BLOCK + 5, 2 * BLOCK]
    parts = [noise.uniform(KEY, a, b) for a, b in pairwise(cuts)]
    assert torch.equal(torch.cat(parts), whole)
    assert noise.uniform(KEY, 5, 5).numel() == 0


def test_uniform_numbers_fill_the_range_evenly():
    """Mean 0 with deviation 1 / sqrt(3 n), square 1/3 with deviation sqrt(4 / 45 n)."""
    count = 2**20
    drawn = noise.uniform(KEY, 0, count).double()
    assert -1 < drawn.min() < -0.9999
    assert 0.9999 < drawn.max() < 1
    assert abs(drawn.mean()) < 5 / sqrt(3 * count)
    assert abs(drawn.square().mean() - 1 / 3) < 5 * sqrt(4 / 45 / count)
    counts = torch.histc(drawn, 256, -1, 1)
    square = float(((counts - count / 256) ** 2 / (count / 256)).sum())
    assert abs(square - 255) < 5 * sqrt(510)


def test_uniform_numbers_are_odd_multiples_of_a_power_of_two():
    drawn = noise.uniform(KEY, 0, 4_096).double() * 2**noise.UNIFORM_BITS
    assert torch.equal(drawn, drawn.round())
    assert bool((drawn.remainder(2) == 1).all())
