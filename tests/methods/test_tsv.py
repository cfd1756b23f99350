"""TSV-M against the equations, and where singular vectors depend on one another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from merge_kit.errors import SolveError
from merge_kit.methods import spectral
from merge_kit.methods.iso_c import IsoC
from merge_kit.methods.iso_cts import IsoCTS
from merge_kit.methods.tsv import TSV
from merge_kit.methods.wudi import WUDI
from tests.methods.spectra import apart, low_rank, noisy, normal, task_vector

ALL = [TSV(), IsoC(), IsoC(mean_over="rank"), IsoCTS(), WUDI()]
every = pytest.mark.parametrize("method", ALL, ids=lambda m: m.method_name)


def by_definition(deltas):
    """Return U_perp diag(S) V_perp of numpy's singular vectors, all of them kept."""
    count = max(1, min(deltas[0].shape) // len(deltas))
    parts = [np.linalg.svd(d.numpy(), full_matrices=False) for d in deltas]
    left = np.concatenate([u[:, :count] for u, _, _ in parts], axis=1)
    values = np.concatenate([s[:count] for _, s, _ in parts])
    right = np.concatenate([v[:count] for _, _, v in parts])
    polar = []
    for matrix in (left, right):
        u, _, v = np.linalg.svd(matrix, full_matrices=False)
        polar.append(u @ v)
    return torch.from_numpy(polar[0] @ np.diag(values) @ polar[1])


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (60, 12), (12, 12)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_result_is_that_of_the_equation(shape, count):
    deltas = normal(count, *shape)
    assert apart(task_vector(TSV(), deltas), by_definition(deltas)) < 1e-12


def test_tasks_in_orthogonal_directions_are_added():
    one, two = torch.zeros(2, 2, 2, dtype=torch.float64)
    one[0, 0], two[1, 1] = 3.0, 2.0
    assert apart(task_vector(TSV(), [one, two]), torch.tensor([[3.0, 0.0], [0.0, 2.0]])) < 1e-14


def test_a_model_keeps_the_first_singular_vectors_of_its_share():
    """Two tasks of diag(4, 3, 2, 1) turned apart by a permutation keep two directions each."""
    one = torch.diag(torch.tensor([4.0, 3.0, 0.2, 0.1], dtype=torch.float64))
    two = torch.diag(torch.tensor([0.1, 0.2, 3.0, 4.0], dtype=torch.float64))
    wanted = torch.diag(torch.tensor([4.0, 3.0, 3.0, 4.0]))
    assert apart(task_vector(TSV(), [one, two]), wanted) < 1e-14


@every
def test_noise_far_below_rounding_changes_low_rank_task_vectors_no_more_than_itself(method):
    deltas = low_rank(4, 64, 8)
    plain = task_vector(method, deltas)
    assert apart(task_vector(method, noisy(deltas, 1e-12)), plain) < 1e-9


@every
def test_rounding_of_the_models_makes_no_directions(method):
    """Models are stored in float32: their difference has full rank, by the rounding."""
    deltas = low_rank(4, 64, 8)
    base = normal(1, 64, 64)[0].float()
    rounded = [((base.double() + d).float() - base).double() for d in deltas]
    result = task_vector(method, rounded, base.double())
    assert apart(result, task_vector(method, deltas)) < 1e-5  # the rounding, relative: 2e-7


@every
def test_weights_scale_what_counts_as_rounding(method):
    """Times 30, the rounding of a model is 30 times as large."""
    deltas = low_rank(4, 64, 8)
    base = normal(1, 64, 64)[0].float()
    rounded = [((base.double() + d).float() - base).double() for d in deltas]
    weighed = type(method)(weight=(30.0, 0.1, 1.0, 2.0))
    plain = task_vector(weighed, deltas)
    assert apart(task_vector(weighed, rounded, base.double()), plain) < 1e-4


@every
def test_equal_tasks_change_continuously(method):
    (delta,) = normal(1, 30, 20)
    plain = task_vector(method, [delta, delta])
    assert apart(task_vector(method, [delta, *noisy([delta], 1e-13)]), plain) < 1e-10


@every
def test_a_task_vector_of_zero_is_finite_and_changes_no_direction(method):
    zero = torch.zeros(6, 4, dtype=torch.float64)
    assert torch.equal(task_vector(method, [zero, zero]), zero)
    (delta,) = normal(1, 6, 4)
    result = task_vector(method, [delta, zero])
    assert torch.isfinite(result).all()
    assert result.norm() > 0


@every
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (3, 5)])
def test_more_tasks_than_dimensions_are_merged(method, shape):
    result = task_vector(method, normal(8, *shape))
    assert torch.isfinite(result).all()
    assert result.norm() > 0


@every
@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (300, 40)])
def test_runs_repeat_bit_for_bit_with_one_thread_of_torch(method, shape):
    """The engine gives torch one thread; two may sum in another order, and say the same."""
    deltas, before = normal(3, *shape), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            results.append(task_vector(method, deltas))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[2])
    assert apart(results[1], results[0]) < 1e-12


@every
def test_a_vector_is_averaged_by_default_and_weighed_on_demand(method):
    deltas = normal(4, 5)
    assert apart(task_vector(method, deltas), sum(deltas) / 4) < 1e-14
    other = type(method)(other_weight=0.5)
    assert apart(task_vector(other, deltas), sum(deltas) / 2) < 1e-14


@every
def test_a_convolution_is_one_matrix_and_experts_are_one_each(method):
    deltas = normal(2, 4, 3, 5)
    flat = task_vector(method, [d.reshape(4, 15) for d in deltas])
    assert torch.equal(task_vector(method, deltas), flat.reshape(4, 3, 5))
    each = [task_vector(method, [d[i] for d in deltas]) for i in range(4)]
    assert torch.equal(task_vector(method, deltas, name="mlp.experts.w"), torch.stack(each))


@every
def test_a_decomposition_that_fails_names_the_tensor(method, monkeypatch):
    def fails(matrix):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(spectral, "_svd", fails)
    with pytest.raises(SolveError, match=r"layers\.0\.w: no singular values of"):
        task_vector(method, normal(2, 3, 3), name="layers.0.w")


@every
def test_what_is_not_finite_is_not_decomposed(method):
    bad = torch.full((3, 3), float("nan"), dtype=torch.float64)
    assert task_vector(method, [bad, bad]).isnan().all()


def test_operations_grow_with_the_cube_of_the_smaller_side():
    assert spectral.svd_flops((8, 8), "w") == 8 * spectral.svd_flops((4, 4), "w")
    assert TSV().flops("w", (4, 4), 3) == 5 * spectral.svd_flops((4, 4), "w")
    assert TSV().flops("w", (4,), 3) == 0.0
