"""Adapters aligned by one decomposition, held to the equations with dense matrices in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from merge_kit.methods import noise
from merge_kit.methods.aligned import align, bases, keep_largest
from merge_kit.methods.base import PerModel
from merge_kit.methods.lora_knots import LoraKnots
from tests.methods.factor_slabs import change, close, factor_slab, made, pair, summed, total
from tests.oracles.adapters import knots, ties, trimmed

SHAPES = [(40, 30), (9, 60), (60, 9), (30, 1), (5, 5)]
WEIGHTS = (0.5, -2.0, 1.25)


def three(shape):
    return [pair(rank, shape, seed) for seed, rank in enumerate((4, 8, 3))]


def knots_of(density: float, **more) -> LoraKnots:
    return LoraKnots(weight=PerModel(WEIGHTS), density=PerModel([density] * 3), **more)


def size(pairs) -> float:
    return sum(float(change(p).norm()) for p in pairs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_aligned_changes_are_merged_by_ties(shape, density, normalize):
    pairs, method = three(shape), knots_of(density, normalize=normalize)
    wanted = knots([change(p) for p in pairs], WEIGHTS, [density] * 3, normalize=normalize)
    rank = method.rank_bound((4, 8, 3), shape)
    assert close(summed(method, pairs, WEIGHTS, rank), wanted, size(pairs))


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_the_paper_trims_before_it_scales(density):
    pairs = three((40, 30))
    parts = [change(p) for p in pairs]
    u, s, v = torch.linalg.svd(torch.cat(parts, dim=1), full_matrices=False)
    wanted = u[:, :15] * s[:15] @ ties(v[:15].split(30, dim=1), WEIGHTS, [density] * 3)
    found = summed(knots_of(density, variant="paper"), pairs, WEIGHTS, 15)
    assert close(found, wanted, size(pairs))
    by_code = summed(knots_of(density), pairs, WEIGHTS, 15)
    assert close(found, by_code, size(pairs)) == (density == 1)


def test_dare_drops_elements_of_aligned_changes_by_the_noise_of_their_place():
    pairs, slab = three((40, 30)), factor_slab(three((40, 30)), WEIGHTS, (15,))
    found = align(bases(pairs), (0, 1, 2), 2.0**-46, slab.name)
    parts = [found.values.unsqueeze(1) * row for row in found.rows]
    kept = []
    for i, part in enumerate(parts):
        mask = noise.kept((slab.seed, "knots", i, slab.name), 0.5, 0, part.numel())
        kept.append(part * torch.from_numpy(mask.reshape(part.shape)) / noise.probability(0.5))
    wanted = found.left @ ties(kept, WEIGHTS, [1.0] * 3)
    ((a, b),) = made(knots_of(0.5, merging="dare_ties"), slab)
    assert close(b @ a, wanted, size(pairs))


def test_an_adapter_is_pruned_alike_alone_and_among_several_that_are_made():
    """Neither the folder of the first one nor adapters that do not count have a say."""
    pairs, weights = three((40, 30)), (0.0, -2.0, 1.25)
    both = replace(factor_slab(pairs, WEIGHTS + weights, (15, 11)), name="first/q.lora_A.weight")
    alone = replace(factor_slab(pairs[1:], weights[1:], (11,)), name="q.lora_A.weight")
    _, (a, b) = made(knots_of(0.5, merging="dare_ties"), both)
    two = LoraKnots(weight=PerModel(weights[1:]), density=PerModel([0.5] * 2), merging="dare_ties")
    ((c, d),) = made(two, alone)
    assert close(b @ a, d @ c, size(pairs))


def test_changes_are_put_together_again_from_their_aligned_parts():
    pairs = three((40, 30))
    found = align(bases(pairs), (0, 2), 2.0**-46, "x")
    for row, i in zip(found.rows, (0, 2), strict=True):
        again = found.left * found.values @ row
        assert close(again, change(pairs[i]), size(pairs))
    side_by_side = torch.cat(found.rows, dim=1)
    assert torch.allclose(side_by_side @ side_by_side.T, torch.eye(7).double(), atol=1e-13)
    assert torch.allclose(found.left.T @ found.left, torch.eye(7).double(), atol=1e-13)


def test_one_adapter_is_itself_and_copies_are_it_too():
    pairs = [pair(4, (40, 30))] * 3
    for weights in ((1.0, 1.0, 1.0), (0.5, 1.0, 2.0)):
        found = summed(knots_of(1.0), pairs, weights, 4)
        assert close(found, change(pairs[0]), size(pairs))
    assert LoraKnots(density=PerModel([1.0])).keeps_one(8)
    assert not LoraKnots(density=PerModel([0.9])).keeps_one(8)
    assert not LoraKnots(density=PerModel([1.0]), lambda_=0.5).keeps_one(8)
    assert not LoraKnots(density=PerModel([1.0]), rank=7).keeps_one(8)


def test_an_adapter_of_weight_zero_takes_no_part():
    pairs = three((40, 30))
    found = summed(knots_of(0.3), pairs, (0.5, 0.0, 1.25), 7)
    two = LoraKnots(density=PerModel([0.3, 0.3]))
    assert close(found, summed(two, [pairs[0], pairs[2]], (0.5, 1.25), 7), size(pairs))


def test_adapters_of_other_outputs_do_not_meet():
    """Each row of the aligned space is then one adapter's alone, and the mean divides by it."""
    (a, b), (c, d) = pair(4, (40, 30)), pair(4, (40, 30), seed=1)
    b[20:], d[:20] = 0.0, 0.0
    method = LoraKnots(density=PerModel([1.0, 1.0]))
    found = summed(method, [(a, b), (c, d)], (1.0, 1.0), 8)
    assert close(found, total([(a, b), (c, d)], (1.0, 1.0)), size([(a, b), (c, d)]))


@pytest.mark.parametrize("rank", [2, 15])
def test_a_truncated_result_misses_the_energy_of_its_tail(rank):
    pairs = three((40, 30))
    wanted = knots([change(p) for p in pairs], WEIGHTS, [0.3] * 3)
    tail = float(torch.linalg.svdvals(wanted)[rank:].square().sum().sqrt())
    (facts,) = knots_of(0.3).merge(factor_slab(pairs, WEIGHTS, (rank,)), {}).facts
    assert facts["residual"] == pytest.approx(tail, abs=1e-12 * size(pairs))
    assert facts["norm"] == pytest.approx(float(wanted.norm()))


def test_energy_finds_the_smallest_rank_that_keeps_it():
    pairs = three((40, 30))
    wanted = knots([change(p) for p in pairs], WEIGHTS, [0.3] * 3)
    shares = torch.linalg.svdvals(wanted).square().cumsum(0) / wanted.norm() ** 2
    (found,) = knots_of(0.3, energy=0.9).fit(factor_slab(pairs, WEIGHTS), {})
    assert found.rank == 1 + int((shares < 0.9).sum())


@pytest.mark.parametrize("density", [0.0, 0.01, 0.25, 0.5, 0.99, 1.0])
def test_of_equal_magnitudes_the_first_are_kept(density):
    draw = torch.Generator().manual_seed(0)
    row = torch.randint(-3, 4, (60,), generator=draw).double()
    wanted = trimmed(row, density)
    keep_largest(row, density)
    assert torch.equal(row, wanted)
