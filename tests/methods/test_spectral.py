"""What spectral methods share: ranks, matrices and what is none, scales, cases by hand."""

from __future__ import annotations

import pytest
import torch

from merge_kit.methods import spectral
from merge_kit.methods.iso_c import IsoC
from merge_kit.methods.iso_cts import IsoCTS
from merge_kit.methods.tsv import TSV
from merge_kit.methods.wudi import WUDI
from tests.methods.slabs import slab_of
from tests.methods.spectra import apart, low_rank, noisy, normal, task_vector

every = pytest.mark.parametrize("kind", [TSV, IsoC, IsoCTS, WUDI], ids=lambda k: k.method_name)


def diagonal(*values):
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def test_what_is_a_matrix():
    assert spectral.matrices("norm.weight", (5,)) is None
    assert spectral.matrices("scale", ()) is None
    assert spectral.matrices("q_proj.weight", (1, 7)) == (1, 1, 7)
    assert spectral.matrices("conv.weight", (4, 3, 5, 5)) == (1, 4, 75)
    assert spectral.matrices("conv1d.weight", (4, 3, 5)) == (1, 4, 15)
    assert spectral.matrices("mlp.experts.gate_up_proj", (8, 6, 4)) == (8, 6, 4)
    assert spectral.matrices("block_sparse_moe.input_linear.weight", (8, 6, 4)) == (8, 6, 4)


def test_biases_of_experts_are_no_matrix():
    assert spectral.matrices("mlp.experts.down_proj_bias", (8, 6)) is None
    assert spectral.matrices("mlp.experts.0.down_proj.bias", (6,)) is None
    assert spectral.matrices("relative_attention_bias.weight", (8, 6)) == (1, 8, 6)


def test_singular_values_that_are_rounding_have_no_vectors():
    matrix = diagonal(1.0, 2.0**-22, 2.0**-24)
    assert spectral.decompose(matrix, 0.0, "x").values.tolist() == [1.0, 2.0**-22]
    assert spectral.decompose(matrix, 0.5, "x").values.tolist() == [1.0]
    assert spectral.decompose(matrix, 1.0, "x").values.tolist() == []


@pytest.mark.parametrize("shape", [(40, 3), (3, 40), (11, 3), (5, 5), (1, 6), (6, 1)])
def test_parts_give_the_matrix_back(shape):
    (matrix,) = normal(1, *shape)
    parts = spectral.decompose(matrix, 0.0, "x")
    assert apart((parts.left * parts.values) @ parts.right, matrix) < 1e-14
    kept = torch.eye(min(shape), dtype=torch.float64)
    assert torch.allclose(parts.left.T @ parts.left, kept, atol=1e-14)
    assert torch.allclose(parts.right @ parts.right.T, kept, atol=1e-14)


def test_the_nearest_orthogonal_of_equal_vectors_shares_their_direction():
    """[u u] has the one singular value sqrt 2: both columns become u / sqrt 2."""
    column = torch.tensor([[0.6], [0.8]], dtype=torch.float64)
    found = spectral.nearest_orthogonal(torch.cat([column, column], dim=1), "x")
    assert torch.allclose(found, column.expand(2, 2) / 2**0.5, atol=1e-15)


def test_rounding_grows_with_the_base_and_its_sides():
    """Elements of 2: half a unit in the last place is about 2^-23; a side of 4 has root 2."""
    assert spectral.rounding_floor(torch.full((4, 9), 2.0)) == pytest.approx(2.0**-23 * (2 + 3))
    assert spectral.rounding_floor(torch.zeros(0, 3)) == 0.0


def test_the_rounding_of_a_base_covers_what_storing_leaves():
    for shape in ((64, 64), (20, 300), (1, 50), (300, 8)):
        base = normal(1, *shape)[0].float() * 0.05
        exact = base.double() + 1e-3 * normal(2, *shape)[1]
        noise = torch.linalg.matrix_norm(exact.float().double() - exact, 2)
        assert float(noise) < spectral.rounding_floor(base)


def test_two_equal_tasks_give_their_leading_half_once():
    """k = 4 / 2: of diag(4, 3, 2, 1) stay 4 and 3, and twice the same direction is one."""
    task = diagonal(4.0, 3.0, 2.0, 1.0)
    assert apart(task_vector(TSV(), [task, task]), diagonal(4.0, 3.0, 0.0, 0.0)) < 1e-14


def test_the_rank_of_each_task_is_rounded_down():
    """Of 5 singular values, two tasks keep 2 each, three 1 each, nine still 1 each."""
    tasks = [diagonal(5.0, 4.0, 3.0, 2.0, 1.0) for _ in range(9)]
    for count, kept in ((2, 2), (3, 1), (9, 1)):
        rank = torch.linalg.matrix_rank(task_vector(TSV(), tasks[:count]))
        assert int(rank) == kept


def test_iso_cts_by_hand():
    """Half of 4 directions shared; diag(4, 3, 1, 0) and diag(4, 3, 0, 2) have one more each.

    The mean of 8, 6, 1 and 2 is 17 / 4.
    """
    tasks = [diagonal(4.0, 3.0, 1.0, 0.0), diagonal(4.0, 3.0, 0.0, 2.0)]
    wanted = 17 / 4 * torch.eye(4, dtype=torch.float64)
    assert apart(task_vector(IsoCTS(common=0.5), tasks), wanted) < 1e-14


def test_wudi_by_hand():
    """Shares of |d|^2 = 10 and 5: column 0 is weighed 9 / 10 to 4 / 5, column 1 1 / 10 to 1 / 5."""
    found = task_vector(WUDI(), [diagonal(3.0, 1.0), diagonal(-2.0, 1.0)])
    first = (3 * 0.9 - 2 * 0.8) / (0.9 + 0.8)
    assert apart(found, diagonal(first, 1.0)) < 1e-14


@every
def test_a_weight_of_zero_leaves_a_model_out_of_matrices_and_vectors(kind):
    for shape in ((6, 4), (5,)):
        deltas = normal(3, *shape)
        without = task_vector(kind(weight=(1.0, 2.0)), [deltas[0], deltas[2]])
        found = task_vector(kind(weight=(1.0, 0.0, 2.0)), deltas)
        assert torch.equal(found, without)


@every
def test_a_negative_weight_turns_a_task_around(kind):
    one, two = normal(2, 6, 9)
    turned = task_vector(kind(weight=(1.0, -2.0)), [one, two])
    assert apart(turned, task_vector(kind(), [one, -2.0 * two])) < 1e-12


@every
def test_weights_of_zero_give_the_base(kind):
    base = normal(1, 3, 4)[0].flatten().float()
    slab = slab_of([torch.ones(12), torch.ones(12)], base, shape=(3, 4))
    assert torch.equal(kind(weight=(0.0, 0.0)).merge(slab, {}), base)


@every
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,), ()])
def test_empty_and_0_d_tensors(kind, shape):
    deltas = normal(2, *shape)
    found = task_vector(kind(), deltas)
    assert torch.allclose(found, (deltas[0] + deltas[1]) / 2)


@every
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_float32_slabs_hold_what_is_finite(kind, size):
    deltas = normal(3, 12, 20)
    slab = slab_of([(d * size).float() for d in deltas], torch.zeros(240), shape=(12, 20))
    found = kind().merge(slab, {})
    assert found.dtype == torch.float32
    assert apart(found.double().view(12, 20) / size, task_vector(kind(), deltas)) < 1e-6


@every
def test_low_rank_stays_low_where_models_are_float32(kind):
    """Two equal LoRAs, and four different ones, in a base ten thousand times their size."""
    base = (normal(1, 64, 64)[0] * 0.05).float()
    for deltas in (low_rank(4, 64, 8), low_rank(1, 64, 8) * 2):
        small = [1e-5 * d for d in deltas]
        stored = [(base.double() + d).float() - base for d in small]
        slab = slab_of(stored, base.flatten().clone(), shape=(64, 64))
        found = kind().merge(slab, {}).view(64, 64).double() - base.double()
        assert apart(found, task_vector(kind(), small)) < 1e-2  # storing them costs 1e-3


@every
def test_float32_and_float64_slabs_agree_to_the_rounding_of_float32(kind):
    base = (normal(1, 24, 16)[0] * 0.05).float()
    deltas = [(1e-2 * d).float() for d in normal(3, 24, 16)]
    narrow = slab_of(deltas, base.flatten().clone(), shape=(24, 16))
    wide = slab_of([d.double() for d in deltas], base.double().flatten(), shape=(24, 16))
    found = kind().merge(narrow, {}).double() - kind().merge(wide, {})
    assert float(found.abs().max()) <= 2.0**-24 * 0.5  # half a unit in the last place below 0.5


@every
def test_tasks_that_cancel_give_nothing_large(kind):
    (delta,) = normal(1, 8, 8)
    against = noisy([-delta], 1e-7)[0]
    found = task_vector(kind(), [delta, against])
    assert float(found.norm()) < 10 * float(delta.norm())
    assert torch.isfinite(found).all()
