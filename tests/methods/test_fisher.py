from __future__ import annotations

import itertools

import pytest
import torch

from merge_kit.core.tensors import BLOCK
from merge_kit.errors import CheckpointError, ParameterError
from merge_kit.methods.base import PerModel
from merge_kit.methods.fisher import Fisher
from tests.engine.handmade import run, step, stored
from tests.methods.weighed import operand_name, weighed


def fisher(count=2, weight=None, **more) -> Fisher:
    files = PerModel(f"{i}.safetensors" for i in range(count))
    return Fisher(statistics=files, weight=PerModel(weight or [1.0] * count), **more)


def oracle(models, evidence, weights, floor, *, normalize):
    """Return the average and sum |w x| in float64, from the equation."""
    found = [e.double() for e in evidence]
    if normalize:
        found = [e / e.square().mean().sqrt() for e in found]
    found = [w * e.clamp(min=floor) for w, e in zip(weights, found, strict=True)]
    shares = [e / sum(found) for e in found]
    terms = [s * m.double() for s, m in zip(shares, models, strict=True)]
    return sum(terms), sum(t.abs() for t in terms)


def random(count, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    models = [torch.randn(shape, generator=generator) for _ in range(count)]
    exponents = [torch.randn(shape, generator=generator).mul(8) for _ in range(count)]
    return models, [torch.exp(e) * 1e-9 for e in exponents]


A, B = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0], [7.0, 8.0]])


def test_each_element_is_weighted_by_its_evidence(tmp_path):
    """(1*1 + 3*5) / 4 = 4; (3*3 + 1*7) / 4 = 4; evidence of neither gives the mean."""
    evidence = [torch.tensor([[1.0, 0.0], [3.0, 1.0]]), torch.tensor([[3.0, 0.0], [1.0, 1.0]])]
    result = weighed(fisher(normalize_fisher=False), [A, B], evidence, tmp_path)
    assert result.tolist() == [[4.0, 4.0], [4.0, 6.0]]


def test_weights_multiply_the_evidence(tmp_path):
    """(2*1*1 + 1*3*5) / 5 = 3.4."""
    evidence = [torch.ones(2, 2), torch.full((2, 2), 3.0)]
    result = weighed(fisher(weight=[2.0, 1.0], normalize_fisher=False), [A, B], evidence, tmp_path)
    assert result[0, 0] == pytest.approx(3.4)


def test_a_constant_factor_on_one_models_evidence_is_normalised_away(tmp_path):
    evidence = [torch.tensor([1.0, 0.0, 2.0]), torch.tensor([2.0, 1.0, 0.0])]
    models = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 1.0])]
    plain = weighed(fisher(), models, evidence, tmp_path / "a")
    scaled = weighed(fisher(), models, [evidence[0] * 2.0**-60, evidence[1]], tmp_path / "b")
    assert torch.equal(plain, scaled)
    assert plain[0] == pytest.approx((1 * 1 + 2 * 3) / 3, rel=1e-6)


def test_the_norm_is_that_of_the_whole_model(tmp_path):
    """Over both tensors the norms are 5 and 5: the second element of y has 4 against 3."""
    method, steps = fisher(floor=0.0), []
    for name, values in (("x", [[3.0], [4.0]]), ("y", [[4.0], [3.0]])):
        inputs = [stored(tmp_path, f"{name}{i}", torch.tensor([float(i)])) for i in range(2)]
        aux = tuple(
            (operand_name(i), stored(tmp_path, f"{name}s{i}", torch.tensor(v)))
            for i, v in enumerate(values)
        )
        steps.append(step(method, inputs, aux=aux, name=name))
    result = run(steps, tmp_path / "out")
    assert float(result["x"]) == pytest.approx(4 / 7, rel=1e-6)
    assert float(result["y"]) == pytest.approx(3 / 7, rel=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_within_law_4_of_the_equation(tmp_path, count, normalize):
    models, evidence = random(count, (3, 5_000))
    weights = [0.5 + i for i in range(count)]
    method = fisher(count, weights, normalize_fisher=normalize, floor=1e-12)
    result = weighed(method, models, evidence, tmp_path)
    wanted, mass = oracle(models, evidence, weights, 1e-12, normalize=normalize)
    error = (result.double() - wanted).abs()
    assert torch.all(error <= 2.0**-22 * method.error_factor * mass)


def test_slab_size_and_threads_change_no_bit(tmp_path):
    models, evidence = random(3, (2 * BLOCK + 77,))
    results = [
        weighed(fisher(3), models, evidence, tmp_path / f"{b}-{w}", blocks=b, workers=w)
        for b, w in itertools.product((1, 3), (1, 2))
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_no_evidence_at_all_is_the_weighted_mean(tmp_path):
    for floor in (1e-6, 0.0):
        method = fisher(weight=[3.0, 1.0], floor=floor)
        result = weighed(method, [A, B], [torch.zeros(2, 2)] * 2, tmp_path / str(floor))
        assert torch.allclose(result, (3 * A + B) / 4)


def test_favor_first_lets_the_first_model_decide_what_no_model_knows(tmp_path):
    evidence = [torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])]
    method = fisher(favor_first=True, normalize_fisher=False)
    result = weighed(method, [A, B], evidence, tmp_path)
    assert result[0, 0] == A[0, 0]
    assert result[0, 1] == pytest.approx(6.0, abs=1e-5)
    assert result[1, 0] == A[1, 0]


@pytest.mark.parametrize("size", [3e38, 1e-30, 1e-44])
def test_evidence_of_any_size_gives_finite_averages(tmp_path, size):
    evidence = [torch.full((4,), size), torch.tensor([0.0, size, size / 4, 1.0])]
    models = [torch.full((4,), 1e37), torch.full((4,), 3e37)]
    for normalize in (True, False):
        method = fisher(floor=0.0, normalize_fisher=normalize)
        result = weighed(method, models, evidence, tmp_path / str(normalize))
        assert torch.all((result >= 0.99e37) & (result <= 3.01e37))


def test_a_model_of_weight_0_has_no_say(tmp_path):
    evidence = [torch.full((2, 2), 1e-30), torch.full((2, 2), 1e8)]
    method = fisher(weight=[1.0, 0.0], normalize_fisher=False)
    assert torch.equal(weighed(method, [A, B], evidence, tmp_path), A)


@pytest.mark.parametrize(("value", "found"), [(-1.0, "hold -1"), (float("nan"), "NaN")])
@pytest.mark.parametrize("normalize", [True, False])
def test_evidence_that_is_none_names_model_and_tensor(tmp_path, value, found, normalize):
    evidence = [torch.ones(2, 2), torch.tensor([[1.0, value], [1.0, 1.0]])]
    with pytest.raises(CheckpointError, match=found) as caught:
        weighed(fisher(normalize_fisher=normalize), [A, B], evidence, tmp_path)
    assert caught.value.where == "x"
    assert "input-2" in caught.value.problem


@pytest.mark.parametrize(
    ("weights", "more", "problem"),
    [
        ([1.0, -1.0], {}, "weight is -1, expected a number from 0"),
        ([0.0, 0.0], {}, "weight is 0 for every model"),
        ([1.0, 1.0], {"floor": -1e-6}, "floor is -1e-06, expected"),
    ],
)
def test_parameters_out_of_range_are_refused(weights, more, problem):
    with pytest.raises(ParameterError, match=problem):
        fisher(weight=weights, **more)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (2, 3, 4)])
def test_every_shape_is_merged(tmp_path, shape):
    models, evidence = random(2, shape)
    result = weighed(fisher(), models, evidence, tmp_path)
    assert result.shape == shape
    assert torch.isfinite(result).all()


def test_copies_give_the_copy_whatever_the_evidence(tmp_path):
    (model,), _ = random(1, (400,))
    _, evidence = random(3, (400,))
    result = weighed(fisher(3), [model] * 3, evidence, tmp_path)
    assert torch.all((result - model).abs() <= Fisher.laws["copies"] * model.abs())


def test_rows_and_models_permute(tmp_path):
    models, evidence = random(3, (50, 7))
    plain = weighed(fisher(3), models, evidence, tmp_path / "a")
    turned = weighed(fisher(3), models[::-1], evidence[::-1], tmp_path / "b")
    mixed = [[t[torch.arange(49, -1, -1)] for t in part] for part in (models, evidence)]
    upside = weighed(fisher(3), *mixed, tmp_path / "c")
    for other in (turned, upside.flip(0)):
        assert torch.all((plain - other).abs() <= 2.0**-20 * plain.abs().amax())
