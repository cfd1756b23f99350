"""Laws that hold for every method that makes models, each claim at its stated tolerance."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import pytest
import torch

from merge_kit.core.tensors import BLOCK
from merge_kit.methods.evidence import operand_name
from merge_kit.methods.registry import find, names, parameters
from tests.engine.handmade import run, step, stored
from tests.variants import MODEL_METHODS, VARIANTS, make

CLAIMS = [
    pytest.param(variant, law, id=f"{variant}-{law}")
    for variant in VARIANTS
    for law in variant.kind.laws
    if law not in variant.breaks
]
every = pytest.mark.parametrize("variant", VARIANTS, ids=str)


@dataclass(frozen=True)
class Inputs:
    """Tensors of a base, of models, and of their statistics, in files."""

    base: object
    models: list
    statistics: list

    def merged(self, method, out: Path, **options):
        """Return what a method makes of them, in float64 above four operands."""
        return run([self.step(method)], out, **options)["x"]

    def step(self, method, name="x"):
        has_base = method.needs_base or method.takes_base
        wide = "F64" if len(self.models) + has_base > 4 else None
        return step(
            method,
            self.models,
            base=self.base if has_base else None,
            dtype="F64" if self.models[0].dtype == "F64" else "F32",
            compute=wide,
            aux=tuple((operand_name(i), s) for i, s in enumerate(self.statistics)),
            name=name,
        )


def files(variant, models, base, folder, statistics=None) -> Inputs:
    """Write tensors, and statistics if the method has any."""
    folder.mkdir(parents=True, exist_ok=True)
    if statistics is None and variant.kind.statistics_of:
        statistics = [evidence(variant, m, seed) for seed, m in enumerate(models)]
    return Inputs(
        stored(folder, "base", base),
        [stored(folder, f"m{i}", m) for i, m in enumerate(models)],
        [stored(folder, f"s{i}", s) for i, s in enumerate(statistics or ())],
    )


def evidence(variant, model, seed):
    """Return statistics for a tensor: an importance an element, or a Gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    if variant.kind.statistics_of == "elements":
        return torch.rand(model.shape, generator=generator)
    seen = torch.randn((2 * model.shape[1], model.shape[1]), generator=generator)
    return seen.T @ seen


def takes(variant, shape) -> bool:
    """Return whether a method meets a shape; weights without Gram matrices are merged by linear."""
    return variant.kind.statistics_of != "inputs" or len(shape) == 2


def numbers(count: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def rising(count: int) -> list[float]:
    return [0.5 + i / count for i in range(count)]


def close(result, wanted, tolerance: float) -> bool:
    if tolerance == 0.0:
        return torch.equal(result, wanted)
    return bool(torch.all((result - wanted).abs() <= tolerance * wanted.abs().amax()))


def long(variant, shape):
    """Return a shape, upright for methods whose work grows with the cube of the columns."""
    return shape[::-1] if variant.kind.grain == "tensor" else shape


@every
def test_slab_size_and_threads_change_no_bit(tmp_path, variant):
    """For 2, 8 and 50 models with neutral parameters, for the fewest and 8 with others."""
    for count in variant.counts():
        if count == 50 and variant.more:
            continue
        base, *models = numbers(count + 1, *long(variant, (3, BLOCK + 13)))
        inputs = files(variant, models, base, tmp_path / str(count))
        method = make(variant, count, rising(count))
        results = [
            inputs.merged(method, tmp_path / f"{count}-{b}-{w}", blocks=b, workers=w)
            for b, w in ((1, 1), (1, 2), (3, 2))
        ]
        assert all(torch.equal(results[0], other) for other in results[1:])


@every
def test_slab_size_changes_no_bit_of_float64(tmp_path, variant):
    """Rows of odd length lie at other addresses in slabs of another size, alone or with others."""
    count = variant.counts()[0]
    base, *models = (t.double() for t in numbers(count + 1, *long(variant, (5, 40_001))))
    inputs = files(variant, models, base, tmp_path / "in")
    method = make(variant, count, rising(count))
    results = [inputs.merged(method, tmp_path / str(b), blocks=b) for b in (1, 2, 4)]
    assert results[0].dtype == torch.float64
    assert all(torch.equal(results[0], other) for other in results[1:])


WHOLE = [variant for variant in VARIANTS if variant.whole_model]


@pytest.mark.parametrize("variant", WHOLE, ids=str)
def test_slabs_and_threads_change_no_bit_of_what_scans_the_whole_model(tmp_path, variant):
    shapes = [(3, BLOCK + 13), (2, 3), (), (0, 4), (70, 1000)]
    inputs = []
    for i, shape in enumerate(shapes):
        base, *models = numbers(3, *shape)
        inputs.append(files(variant, models, base, tmp_path / f"in-{i}"))
    method, results = make(variant, 2, rising(2)), []
    for blocks, workers in ((1, 1), (1, 2), (3, 2)):
        steps = [one.step(method, name=f"t{i}") for i, one in enumerate(inputs)]
        out = tmp_path / f"out-{blocks}-{workers}"
        results.append(run(steps, out, blocks=blocks, workers=workers))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in results[0])


@every
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0), (1, 1), (2, 3, 4)])
def test_every_shape_is_merged(tmp_path, variant, shape):
    for count in variant.counts()[:2] if takes(variant, shape) else ():
        base, *models = numbers(count + 1, *shape)
        inputs = files(variant, models, base, tmp_path / str(count))
        result = inputs.merged(make(variant, count), tmp_path / f"{count}-out")
        assert result.shape == shape
        assert torch.isfinite(result).all()


@every
@pytest.mark.parametrize("number", [0.0, 1e-38, 1e18])
def test_finite_in_finite_out(tmp_path, variant, number):
    for count in variant.counts()[:2]:
        models = [torch.full((8, 5), number * (-1) ** i) for i in range(count)]
        inputs = files(variant, models, torch.full((8, 5), number), tmp_path / str(count))
        result = inputs.merged(make(variant, count), tmp_path / f"{count}-out")
        assert isfinite(float(result.double().sum()))


@pytest.mark.parametrize("name", MODEL_METHODS)
def test_a_method_claims_at_least_one_law(name):
    assert find(name).laws


def law_single(variant, folder):
    base, model = numbers(2, 30, 41)
    return files(variant, [model], base, folder).merged(make(variant, 1), folder / "out"), model


def law_copies(variant, folder):
    (model,) = numbers(1, 30, 41)
    count = variant.counts()[-1]
    method = make(variant, count, rising(count))
    return files(variant, [model] * count, model, folder).merged(method, folder / "out"), model


def law_copies_of_base(variant, folder):
    return law_copies(variant, folder)


def law_permute_models(variant, folder):
    count = variant.counts()[-1]
    base, *models = numbers(count + 1, 30, 41)
    there = files(variant, models, base, folder / "a")
    back = Inputs(there.base, there.models[::-1], there.statistics[::-1])
    weights = rising(count)
    result = there.merged(make(variant, count, weights), folder / "there")
    return result, back.merged(make(variant, count, weights[::-1]), folder / "back")


def law_permute_rows(variant, folder):
    count = variant.counts()[0]
    base, *models = numbers(count + 1, 30, 41)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    method, statistics = make(variant, count), None
    if variant.kind.statistics_of:
        statistics = [evidence(variant, m, seed) for seed, m in enumerate(models)]
    plain = files(variant, models, base, folder / "a", statistics)
    if variant.kind.statistics_of == "elements":
        statistics = [s[order] for s in statistics]
    turned = files(variant, [m[order] for m in models], base[order], folder / "b", statistics)
    return turned.merged(method, folder / "c"), plain.merged(method, folder / "d")[order]


@pytest.mark.parametrize(("variant", "law"), CLAIMS)
def test_a_law_that_a_method_claims_holds(tmp_path, variant, law):
    result, wanted = globals()[f"law_{law}"](variant, tmp_path)
    assert close(result, wanted, variant.kind.laws[law])


@pytest.mark.parametrize("name", MODEL_METHODS)
def test_every_method_is_held_to_its_laws_with_other_parameters(name):
    mine = [variant for variant in VARIANTS if variant.name == name]
    assert len(mine) > 1 or not parameters(find(name))


@pytest.mark.parametrize("name", names())
def test_a_docstring_says_formula_parameters_cost_and_source(name):
    text = find(name).__doc__ or ""
    assert "Source:" in text
    assert "Cost:" in text
    for parameter in parameters(find(name)):
        assert f"{parameter.field}:" in text
