"""Bases of hidden states, found of sources in float64."""

from __future__ import annotations

import threading

import pytest
import torch

from merge_kit.core.tensors import BLOCK
from merge_kit.engine.basis import embedding_basis, given_basis
from merge_kit.engine.kernel import Kernel
from merge_kit.errors import InterruptedRun, NonFiniteError, SolveError
from merge_kit.io.reader import Reader
from merge_kit.plan.building.width_basis import EmbeddingBasis, GivenBasis
from tests.engine.handmade import stored

GENERATOR = torch.Generator().manual_seed(3)
GO = threading.Event()


def found(find, task, stop=GO):
    with Reader([]) as reader:
        return find(task, Kernel(reader).operands, stop)


def test_directions_by_falling_length_each_with_its_largest_number_positive(tmp_path):
    """Three tokens along (0, -1) of length 3, 2 and 1, one along (1, 0) of length 2."""
    embedding = torch.tensor([[0.0, -3.0], [0.0, 2.0], [2.0, 0.0], [0.0, 1.0]])
    task = EmbeddingBasis(stored(tmp_path, "e", embedding), 2, "e")
    expected = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    assert torch.equal(found(embedding_basis, task)["onto"], expected)


@pytest.mark.parametrize("rows", [5, 40])
def test_rows_are_singular_vectors(rows, tmp_path):
    tall = 3 * 8 * BLOCK // 40 + 7  # several blocks, and a part of one
    embedding = torch.randn(tall, 40, generator=GENERATOR).mul(torch.linspace(0.1, 3, 40))
    task = EmbeddingBasis(stored(tmp_path, "e", embedding), rows, "e")
    onto = found(embedding_basis, task)["onto"]
    assert onto.dtype == torch.float64
    assert onto.shape == (rows, 40)
    torch.testing.assert_close(onto @ onto.T, torch.eye(rows).double())
    lengths = (embedding.double() @ onto.T).norm(dim=0)
    torch.testing.assert_close(lengths, torch.linalg.svdvals(embedding.double())[:rows])
    largest = onto.abs().argmax(dim=1)
    assert bool((onto[torch.arange(rows), largest] > 0).all())


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)])
def test_a_given_basis_has_a_pseudo_inverse(shape, tmp_path):
    matrix = torch.randn(shape, generator=GENERATOR)
    made = found(given_basis, GivenBasis(stored(tmp_path, "m", matrix), "m"))
    assert torch.equal(made["onto"], matrix.double())
    torch.testing.assert_close(made["back"], torch.linalg.pinv(matrix.double()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_has_no_basis(value, tmp_path):
    matrix = torch.eye(4)
    matrix[2, 1] = value
    source = stored(tmp_path, "m", matrix)
    with pytest.raises(NonFiniteError, match="e: holds NaN or infinity"):
        found(embedding_basis, EmbeddingBasis(source, 4, "e"))
    with pytest.raises(NonFiniteError, match="m: the basis holds NaN or infinity"):
        found(given_basis, GivenBasis(source, "m"))


def test_a_basis_that_has_lost_a_direction(tmp_path):
    matrix = torch.eye(4)
    matrix[3] = matrix[2] + 1e-8
    with pytest.raises(SolveError, match="the basis has rank 3, expected 4"):
        found(given_basis, GivenBasis(stored(tmp_path, "m", matrix), "m"))


def test_a_signal_ends_the_finding(tmp_path):
    stop = threading.Event()
    stop.set()
    task = EmbeddingBasis(stored(tmp_path, "e", torch.eye(4)), 4, "e")
    with pytest.raises(InterruptedRun):
        found(embedding_basis, task, stop)
