from __future__ import annotations

import itertools

import pytest
import torch

from merge_kit.errors import CheckpointError, ParameterError, SolveError
from merge_kit.methods import solves
from merge_kit.methods.base import PerModel
from merge_kit.methods.regmean import RegMean
from tests.methods.weighed import weighed


def regmean(count=2, weight=None, **more) -> RegMean:
    files = PerModel(f"{i}.safetensors" for i in range(count))
    return RegMean(statistics=files, weight=PerModel(weight or [1.0] * count), **more)


PAPER = {"scale_off_diagonal": 1.0, "ridge": 0.0}
A, B = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0], [7.0, 8.0]])
G, H = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])


def problem(count, outputs, inputs, seed=0, tokens=400):
    """Return weights, and Gram matrices of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(outputs, inputs, generator=generator) for _ in range(count)]
    mix = torch.randn(inputs, inputs, generator=generator)
    seen = [torch.randn(tokens, inputs, generator=generator) @ mix + i for i in range(count)]
    return weights, [x.T @ x / tokens for x in seen]


def oracle(weights, grams, shares, off=1.0):
    """Return the paper's equation in float64."""
    eye = torch.eye(grams[0].shape[0]).double()
    scaled = [s * g.double() * (off + (1 - off) * eye) for g, s in zip(grams, shares, strict=True)]
    right = sum(w.double() @ g for w, g in zip(weights, scaled, strict=True))
    return right @ torch.linalg.inv(sum(scaled))


def test_the_equation_by_hand(tmp_path):
    """A G + B H has the rows [9, 23] and [17, 35]; (G + H)^-1 = [[5, -1], [-1, 3]] / 14."""
    result = weighed(regmean(**PAPER), [A, B], [G, H], tmp_path)
    wanted = torch.tensor([[(45 - 23) / 14, (69 - 9) / 14], [(85 - 35) / 14, (105 - 17) / 14]])
    assert torch.allclose(result, wanted, rtol=1e-6)


def test_with_nothing_off_the_diagonal_columns_are_averaged_by_their_mean_squares(tmp_path):
    """First column by 2 and 1, second by 2 and 3."""
    method = regmean(scale_off_diagonal=0.0, ridge=0.0)
    result = weighed(method, [A, B], [G, H], tmp_path)
    wanted = [[(2 * 1 + 5) / 3, (2 * 2 + 3 * 6) / 5], [(2 * 3 + 7) / 3, (2 * 4 + 3 * 8) / 5]]
    assert torch.allclose(result, torch.tensor(wanted), rtol=1e-6)


@pytest.mark.parametrize("off", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("count", [2, 5])
def test_close_to_the_equation_in_float64(tmp_path, count, off):
    weights, grams = problem(count, 20, 30)
    shares = [0.5 + i for i in range(count)]
    method = regmean(count, shares, scale_off_diagonal=off, ridge=0.0)
    result = weighed(method, weights, grams, tmp_path)
    wanted = oracle(weights, grams, shares, off)
    assert torch.allclose(result.double(), wanted, rtol=1e-6, atol=1e-6)


def test_it_is_the_least_squares_solution(tmp_path):
    weights, grams = problem(2, 6, 8)
    best = weighed(regmean(**PAPER), weights, grams, tmp_path).double()

    def loss(merged):
        moved = [merged - w.double() for w in weights]
        return sum(((d @ g.double()) * d).sum() for d, g in zip(moved, grams, strict=True))

    generator = torch.Generator().manual_seed(1)
    nudges = (torch.randn(6, 8, generator=generator).double() * 0.05 for _ in range(20))
    assert all(loss(best) < loss(best + nudge) for nudge in nudges)


@pytest.mark.parametrize("more", [{}, PAPER])
def test_equal_gram_matrices_give_the_weighted_mean(tmp_path, more):
    weights, (gram, _) = problem(2, 20, 30)
    method = regmean(weight=[3.0, 1.0], **more)
    result = weighed(method, weights, [gram, gram], tmp_path)
    wanted = (3 * weights[0].double() + weights[1].double()) / 4
    assert torch.allclose(result.double(), wanted, rtol=1e-6, atol=1e-7)


def test_equal_weights_stay_to_the_last_bit(tmp_path):
    (weight, _), grams = problem(2, 20, 30)
    for more in ({}, PAPER):
        method = regmean(weight=[0.3, 0.9], **more)
        result = weighed(method, [weight, weight], grams, tmp_path / str(len(more)))
        assert torch.equal(result, weight)


def test_inputs_that_no_model_has_seen_get_the_plain_mean(tmp_path):
    blind, sees = torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    for more in ({}, PAPER):
        result = weighed(regmean(**more), [A, B], [blind, sees], tmp_path / str(len(more)))
        assert result[:, 0].tolist() == [3.0, 5.0]
        moved = 1 / (1 + regmean(**more).ridge)  # from the mean 4 towards 5, and from 6 towards 7
        assert result[:, 1].tolist() == pytest.approx([4 + moved, 6 + moved])
    nothing = weighed(regmean(), [A, B], [torch.zeros(2, 2)] * 2, tmp_path / "none")
    assert torch.equal(nothing, (A + B) / 2)


def test_a_singular_matrix_is_solved_where_it_can_be(tmp_path):
    """Both models have seen the direction (1, 1) alone: there 3 to 1, across it the mean."""
    along = torch.ones(2, 2)
    models = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]) * 3]
    result = weighed(regmean(**PAPER), models, [3 * along, along], tmp_path)
    total = (3 * 1 + 1 * 3) / 4  # of both columns: what (1, 1) gives
    across = (1 - 3) / 2  # first less second column: the plain mean's
    wanted = torch.tensor([[(total + across) / 2, (total - across) / 2]])
    assert torch.allclose(result, wanted, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_fewer_tokens_than_inputs_give_no_wild_weights(tmp_path, ridge):
    weights, grams = problem(3, 10, 60, tokens=12)
    method = regmean(3, scale_off_diagonal=1.0, ridge=ridge)
    result = weighed(method, weights, grams, tmp_path)
    assert result.abs().amax() < 10 * max(w.abs().amax() for w in weights)


def test_a_ridge_pulls_towards_the_mean(tmp_path):
    exact = weighed(regmean(**PAPER), [A, B], [G, H], tmp_path / "0")
    pulled = weighed(regmean(scale_off_diagonal=1.0, ridge=1.0), [A, B], [G, H], tmp_path / "1")
    mean = (A + B) / 2
    assert torch.all((pulled - mean).abs() < (exact - mean).abs())


def test_weights_that_are_inputs_by_outputs_are_merged_along_their_first_axis(tmp_path):
    weights, grams = problem(2, 3, 5)
    plain = weighed(regmean(), weights, grams, tmp_path / "a")
    turned = weighed(
        regmean(), [w.T.contiguous() for w in weights], grams, tmp_path / "b", of_columns=True
    )
    assert torch.allclose(plain, turned.T, rtol=1e-6)


def test_gram_matrices_of_any_size_give_finite_weights(tmp_path):
    weights, grams = problem(2, 4, 5)
    plain = weighed(regmean(), weights, grams, tmp_path / "1")
    for factor in (2.0**100, 2.0**-100):
        scaled = [g * factor for g in grams]
        assert torch.equal(weighed(regmean(), weights, scaled, tmp_path / str(factor)), plain)


def test_slab_size_and_threads_change_no_bit(tmp_path):
    weights, grams = problem(3, 700, 130)
    results = [
        weighed(regmean(3), weights, grams, tmp_path / f"{b}-{w}", blocks=b, workers=w)
        for b, w in itertools.product((1, 3), (1, 2))
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_rows_and_models_permute(tmp_path):
    weights, grams = problem(3, 50, 20)
    plain = weighed(regmean(3), weights, grams, tmp_path / "a")
    turned = weighed(regmean(3), weights[::-1], grams[::-1], tmp_path / "b")
    upside = weighed(regmean(3), [w.flip(0) for w in weights], grams, tmp_path / "c").flip(0)
    for other in (turned, upside):
        assert torch.all((plain - other).abs() <= 2.0**-20 * plain.abs().amax())


def test_one_model_is_itself_and_weight_0_has_no_say(tmp_path):
    assert torch.equal(weighed(regmean(1), [A], [G], tmp_path / "1"), A)
    method = regmean(weight=[0.0, 1.0])
    assert torch.equal(weighed(method, [A, B], [G, H], tmp_path / "2"), B)


@pytest.mark.parametrize(
    ("gram", "found"),
    [
        ([[-1.0, 0.0], [0.0, 1.0]], "hold -1, expected no negative number"),
        ([[1.0, 0.5], [-0.5, 1.0]], "not symmetric"),
        ([[1.0, float("nan")], [0.0, 1.0]], "NaN"),
    ],
)
def test_what_is_no_gram_matrix_names_model_and_tensor(tmp_path, gram, found):
    with pytest.raises(CheckpointError, match=found) as caught:
        weighed(regmean(), [A, B], [G, torch.tensor(gram)], tmp_path)
    assert caught.value.where == "x"
    assert "input-2" in caught.value.problem


def test_a_decomposition_that_fails_names_the_tensor(monkeypatch):
    def fail(matrix):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    matrix = torch.ones(2, 2).double()
    with pytest.raises(SolveError, match="no eigenvalues of its 2 inputs") as caught:
        solves.solve_from_right(matrix, torch.ones(1, 2).double(), 0.0, where="layer.weight")
    assert caught.value.where == "layer.weight"
    assert "ridge" in caught.value.hint


@pytest.mark.parametrize("name", ["scale_off_diagonal", "ridge"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_parameters_out_of_range_are_refused(name, value):
    with pytest.raises(ParameterError, match=rf"{name} is .*, expected a number in \[0, 1\]"):
        regmean(**{name: value})
