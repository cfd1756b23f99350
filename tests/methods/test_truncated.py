"""The largest singular values of dense matrices: near the best, exact where it must be."""

from __future__ import annotations

import threading

import pytest
import torch

from merge_kit.errors import SolveError
from merge_kit.methods import krylov
from merge_kit.methods import truncated as module
from merge_kit.methods.truncated import rank_of_energy, spectrum, truncated

ROWS, COLUMNS, RANK = 320, 400, 20


def matrix(values, rows=ROWS, columns=COLUMNS, seed=0):
    """Return a float32 matrix of these singular values, the others 0."""
    generator = torch.Generator().manual_seed(seed)
    count = len(values)
    u = torch.linalg.qr(torch.randn(rows, count, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, count, generator=generator, dtype=torch.float64))[0]
    return ((u * torch.as_tensor(values, dtype=torch.float64)) @ v.T).float()


def missed(of, u, s, vh):
    return float((of.double() - (u * s) @ vh).norm())


def best(of, rank):
    return float(torch.linalg.svdvals(of.double())[rank:].norm())


INDEX = torch.arange(1, ROWS + 1, dtype=torch.float64)
SPECTRA = {
    "flat": torch.ones(ROWS),
    "nearly flat": INDEX**-0.25,
    "gentle": INDEX**-0.5,
    "decaying": 1 / INDEX,
    "fast": torch.exp(-INDEX / 10),
    "a floor": torch.exp(-INDEX / 5) + 0.01,
    "a step": torch.cat([torch.ones(30), torch.full((ROWS - 30,), 0.1)]),
}


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("turned", [False, True])
def test_what_is_missed_is_within_a_thousandth_of_the_best(kind, turned):
    of = matrix(SPECTRA[kind])
    of = of.T.contiguous() if turned else of
    assert missed(of, *truncated(of, RANK, "w")) <= 1.001 * best(of, RANK)


def test_a_matrix_of_random_numbers_is_within_a_thousandth_too():
    of = torch.randn(500, 300, generator=torch.Generator().manual_seed(5))
    assert missed(of, *truncated(of, RANK, "w")) <= 1.001 * best(of, RANK)


@pytest.mark.parametrize("rank", [1, 7, RANK])
def test_a_matrix_of_low_rank_is_recovered(rank):
    of = matrix(torch.linspace(1.0, 0.01, rank))
    assert missed(of, *truncated(of, RANK, "w")) <= 1e-6 * float(of.norm())


@pytest.mark.parametrize(("rows", "columns"), [(5, 9), (9, 5), (300, 260), (1, 4), (260, 2)])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_small_matrices_and_many_values_are_exact(rows, columns, share):
    of = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    rank = max(1, int(share * min(rows, columns)))
    u, s, vh = truncated(of, rank, "w")
    torch.testing.assert_close(s, torch.linalg.svdvals(of.double())[:rank], rtol=1e-9, atol=1e-9)
    assert missed(of, u, s, vh) <= best(of, rank) + 1e-7 * float(of.norm())


@pytest.mark.parametrize(
    ("of", "rank"),
    [
        (matrix(SPECTRA["gentle"]), RANK),
        (matrix(SPECTRA["gentle"]).T, 100),
        (matrix(SPECTRA["fast"]), 100),  # the last values are far below the first
        (matrix([2.0, 1.0]), RANK),
        (matrix([2.0, 1.0]), 100),
        (torch.ones(3, 4), 3),
    ],
)
def test_vectors_are_orthonormal_and_values_fall(of, rank):
    u, s, vh = truncated(of, rank, "w")
    identity = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(u.T @ u, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(vh @ vh.T, identity, rtol=0, atol=1e-8)
    torch.testing.assert_close(s, torch.linalg.svdvals(of.double())[:rank], rtol=1e-2, atol=1e-7)
    assert bool((s[:-1] >= s[1:]).all())
    assert (u.dtype, s.dtype, vh.dtype) == (torch.float64,) * 3


def test_the_largest_element_of_each_left_vector_is_positive():
    for of in (matrix(SPECTRA["decaying"]), torch.tensor([[-3.0, 0.0], [0.0, -2.0]])):
        u, _, _ = truncated(of, min(RANK, *of.shape), "w")
        assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())


def test_a_diagonal_by_hand():
    u, s, vh = truncated(torch.tensor([[0.0, -3.0, 0.0], [2.0, 0.0, 0.0]]), 1, "w")
    assert s.tolist() == [3.0]
    assert u.tolist() == [[1.0], [0.0]]
    assert vh.tolist() == [[0.0, -1.0, 0.0]]


def test_every_run_gives_the_same_bits_in_any_thread():
    of, found = matrix(SPECTRA["gentle"]), []

    def run():
        found.append(truncated(of, 9, "w"))

    workers = [threading.Thread(target=run) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_the_matrix_is_left_as_it_is():
    of = matrix(SPECTRA["gentle"])
    before = of.clone()
    truncated(of, RANK, "w")
    spectrum(of, "w")
    assert torch.equal(of, before)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e35])
def test_neither_small_nor_large_numbers_are_lost(scale):
    of = matrix(SPECTRA["decaying"])
    scaled = of * scale
    assert missed(scaled / scale, *_rescaled(scaled, scale)) <= 1.001 * best(of, RANK)
    torch.testing.assert_close(
        spectrum(scaled, "w") / scale, spectrum(of, "w"), rtol=1e-5, atol=1e-7
    )


def _rescaled(of, scale):
    u, s, vh = truncated(of, RANK, "w")
    return u, s / scale, vh


def test_a_matrix_in_float64_keeps_its_digits():
    of = matrix([1.0, 0.5, 0.25]).double() + 1e-9 * matrix(SPECTRA["flat"], seed=2).double()
    assert missed(of, *truncated(of, 3, "w")) <= 1.001 * best(of, 3)


def test_nothing_has_no_values():
    u, s, vh = truncated(torch.zeros(4, 3), 2, "w")
    assert (u.count_nonzero(), s.tolist(), vh.count_nonzero()) == (0, [0.0, 0.0], 0)
    assert (u.shape, vh.shape) == ((4, 2), (2, 3))
    assert spectrum(torch.zeros(4, 3), "w").tolist() == [0.0, 0.0, 0.0]


def test_what_is_not_finite_stays_so():
    for value in (torch.nan, torch.inf):
        of = matrix(SPECTRA["gentle"])
        of[3, 4] = value
        assert all(bool(part.isnan().all()) for part in truncated(of, 2, "w"))


@pytest.mark.parametrize("shape", [(300, 500), (500, 300), (6, 4)])
def test_the_spectrum_is_that_of_lapack(shape):
    of = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    want = torch.linalg.svdvals(of.double())
    torch.testing.assert_close(spectrum(of, "w"), want, rtol=0, atol=2e-8 * float(want[0]))


def test_the_spectrum_of_a_low_rank_is_zero_beyond_it_within_its_accuracy():
    found = spectrum(matrix([4.0, 2.0, 1.0]).double(), "w")
    torch.testing.assert_close(
        found[:4], torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64), rtol=1e-6, atol=4e-7
    )


@pytest.mark.parametrize(("energy", "rank"), [(1e-9, 1), (0.64, 1), (0.65, 2), (0.99, 2), (1.0, 2)])
def test_the_rank_of_an_energy_by_hand(energy, rank):
    values = torch.tensor([4.0, 3.0, 1e-8, 0.0], dtype=torch.float64)  # squares 16, 9: 0.64, 1
    assert rank_of_energy(values, energy) == rank


def test_a_share_that_is_met_exactly_takes_no_rank_more():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        values = torch.rand(12, dtype=torch.float64, generator=generator).sort(descending=True)[0]
        squares = values.square()
        for kept in (3, 7):
            energy = float(squares[:kept].sum() / squares.sum())
            assert rank_of_energy(values, energy) == kept


def test_no_energy_has_no_rank():
    assert rank_of_energy(torch.zeros(3, dtype=torch.float64), 0.5) == 0
    assert rank_of_energy(torch.zeros(0, dtype=torch.float64), 0.5) == 0


@pytest.mark.parametrize("kind", SPECTRA)
def test_a_space_that_has_grown_large_goes_on_from_its_best(monkeypatch, kind):
    of, sizes, real = matrix(SPECTRA[kind]), [], krylov._directions

    def watched(found, known, fresh):
        sizes.append(known.shape[1])
        return real(found, known, fresh)

    monkeypatch.setattr(krylov, "_directions", watched)
    monkeypatch.setattr(krylov, "most", lambda small, rank: RANK + 40)
    assert missed(of, *truncated(of, RANK, "w")) <= 1.001 * best(of, RANK)
    assert max(sizes) < RANK + 40


def test_bills_grow_with_the_rank_and_hold_a_whole_decomposition():
    few, more, many = (module.scratch_bytes(2048, 8192, rank) for rank in (8, 64, 1024))
    assert few < more < many
    assert module.flops(2048, 8192, 8) < module.flops(2048, 8192, 64)
    assert many >= 8 * 4 * 2048**2
    assert module.spectrum_bytes(2048, 8192) >= 8 * 3 * 2048**2
    assert module.scratch_bytes(8192, 2048, 8) == few
    assert module.spectrum_flops(2048, 2048) < module.spectrum_flops(2048, 8192)


def test_a_decomposition_that_fails_names_the_tensor(monkeypatch):
    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    for name in ("svd", "svdvals", "eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, fail)
    for of in (torch.ones(3, 2), matrix(SPECTRA["gentle"])):
        with pytest.raises(SolveError, match=r"q_proj: no singular values of \["):
            truncated(of, 2, "q_proj")
        with pytest.raises(SolveError, match="did not converge"):
            spectrum(of, "q_proj")
