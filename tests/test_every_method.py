"""Laws that hold for every registered method, each claim at its stated tolerance."""

from __future__ import annotations

import itertools
from math import isfinite

import pytest
import torch

from merge_kit.core.tensors import BLOCK
from merge_kit.methods.base import MergeMethod, PerModel
from merge_kit.methods.registry import find, names, parameters
from tests.engine.handmade import run, step, stored

NEUTRAL = {"weight": 1.0, "t": 0.3}
"""Values of required parameters: alone, a model with weight 1 is itself."""


def make(name: str, models: int, values=None, **more) -> MergeMethod:
    """Return a method with neutral parameters, or with a value for each model."""
    kind, chosen = find(name), {}
    for parameter in parameters(kind):
        if parameter.per_model and parameter.required:
            chosen[parameter.field] = PerModel(values or [NEUTRAL[parameter.name]] * models)
        elif parameter.required:
            chosen[parameter.field] = NEUTRAL[parameter.name]
    return kind(**{**chosen, **more})


def merged(method, models, base, folder, **options):
    folder.mkdir(parents=True, exist_ok=True)
    sources = [stored(folder, f"m{i}", m) for i, m in enumerate(models)]
    has_base = method.needs_base or method.takes_base
    ground = stored(folder, "base", base) if has_base else None
    wide = "F64" if len(models) + has_base > 4 else None
    dtype = "F64" if models[0].dtype == torch.float64 else "F32"
    one = step(method, sources, base=ground, dtype=dtype, compute=wide)
    return run([one], folder / "out", **options)["x"]


def counts(name: str) -> list[int]:
    kind = find(name)
    most = kind.max_inputs or 50
    return [n for n in (1, 2, 8, 50) if max(1, kind.min_inputs) <= n <= most]


def numbers(count: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def close(result, wanted, tolerance: float) -> bool:
    if tolerance == 0.0:
        return torch.equal(result, wanted)
    return bool(torch.all((result - wanted).abs() <= tolerance * wanted.abs().amax()))


VARIANTS = [(name, {}) for name in names()] + [("slerp", {"flatten": False})]
CLAIMS = [(name, law) for name in names() for law in find(name).laws]


@pytest.mark.parametrize(("name", "more"), VARIANTS)
def test_slab_size_and_threads_change_no_bit(tmp_path, name, more):
    for count in counts(name):
        base, *models = numbers(count + 1, 3, BLOCK + 13)
        weights = [0.5 + i / count for i in range(count)]
        method = make(name, count, weights, **more)
        results = [
            merged(method, models, base, tmp_path / f"{count}-{b}-{w}", blocks=b, workers=w)
            for b, w in itertools.product((1, 3), (1, 2))
        ]
        assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(("name", "more"), VARIANTS)
def test_slab_size_changes_no_bit_of_float64(tmp_path, name, more):
    """Rows of odd length lie at other addresses in slabs of another size, alone or with others."""
    for count in counts(name)[:2]:
        base, *models = (tensor.double() for tensor in numbers(count + 1, 5, 40_001))
        method = make(name, count, [0.5 + i / count for i in range(count)], **more)
        results = [
            merged(method, models, base, tmp_path / f"{count}-{b}", blocks=b) for b in (1, 2, 4)
        ]
        assert results[0].dtype == torch.float64
        assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(("name", "more"), VARIANTS)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0), (1, 1), (2, 3, 4)])
def test_every_shape_is_merged(tmp_path, name, more, shape):
    for count in counts(name)[:2]:
        base, *models = numbers(count + 1, *shape)
        result = merged(make(name, count, **more), models, base, tmp_path / str(count))
        assert result.shape == shape
        assert torch.isfinite(result).all()


@pytest.mark.parametrize(("name", "more"), VARIANTS)
@pytest.mark.parametrize("number", [0.0, 1e-38, 1e18])
def test_finite_in_finite_out(tmp_path, name, more, number):
    for count in counts(name)[:2]:
        models = [torch.full((40,), number * (-1) ** i) for i in range(count)]
        base = torch.full((40,), number)
        result = merged(make(name, count, **more), models, base, tmp_path / str(count))
        assert isfinite(float(result.double().sum()))


@pytest.mark.parametrize("name", names())
def test_a_method_claims_at_least_one_law(name):
    assert find(name).laws


def law_single(name, tolerance, folder):
    base, model = numbers(2, 30, 41)
    return merged(make(name, 1), [model], base, folder), model, tolerance


def law_copies(name, tolerance, folder):
    (model,) = numbers(1, 30, 41)
    count = counts(name)[-1]
    weights = [0.5 + i / count for i in range(count)]
    method = make(name, count, weights)
    return merged(method, [model] * count, model, folder), model, tolerance


def law_copies_of_base(name, tolerance, folder):
    return law_copies(name, tolerance, folder)


def law_permute_models(name, tolerance, folder):
    count = counts(name)[-1]
    base, *models = numbers(count + 1, 30, 41)
    weights = [0.5 + i / count for i in range(count)]
    result = merged(make(name, count, weights), models, base, folder / "a")
    other = merged(make(name, count, weights[::-1]), models[::-1], base, folder / "b")
    return result, other, tolerance


def law_permute_rows(name, tolerance, folder):
    count = counts(name)[0]
    base, *models = numbers(count + 1, 30, 41)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    method = make(name, count)
    result = merged(method, [m[order] for m in models], base[order], folder / "a")
    return result, merged(method, models, base, folder / "b")[order], tolerance


@pytest.mark.parametrize(("name", "law"), CLAIMS)
def test_a_law_that_a_method_claims_holds(tmp_path, name, law):
    check = globals()[f"law_{law}"]
    result, wanted, tolerance = check(name, find(name).laws[law], tmp_path)
    assert close(result, wanted, tolerance)


@pytest.mark.parametrize("name", names())
def test_a_docstring_says_formula_parameters_cost_and_source(name):
    text = find(name).__doc__ or ""
    assert "Source:" in text
    assert "Cost:" in text
    for parameter in parameters(find(name)):
        assert f"{parameter.field}:" in text
