from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import merge_kit as mk
from merge_kit.core.tensors import BLOCK
from merge_kit.methods.registry import find, parameters
from tests.toys import write
from tests.variants import MODEL_METHODS

REQUIRED = {"weight": 0.6, "t": 0.3}
ROWS = {"flatten": False}


def told(name: str, models: list[torch.Tensor]) -> dict:
    """Return a value for each required parameter."""
    found = {p.field: REQUIRED.get(p.name, 1) for p in parameters(find(name)) if p.required}
    if find(name).statistics_of:
        found["statistics"] = [statistics(find(name).statistics_of, model) for model in models]
    return found


def statistics(of: str, model: torch.Tensor) -> torch.Tensor:
    """Return an importance for each element, or the Gram matrix of as many inputs as columns."""
    if of == "elements":
        return model.float() ** 2
    columns = model.shape[-1] if model.dim() else 1
    return torch.eye(columns) * (1 + model.float().abs().sum())


def drawn(count: int, shape, dtype=torch.float32) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(count)
    return [torch.randn(shape, generator=draw).to(dtype) for _ in range(count)]


@pytest.mark.parametrize(("name", "more"), [*((n, {}) for n in MODEL_METHODS), ("slerp", ROWS)])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, BLOCK + 13), torch.float32), ((7, 5), torch.bfloat16), ((9,), torch.float64)],
)
def test_tensors_and_files_give_the_same_bits(tmp_path, name, more, shape, dtype):
    kind = find(name)
    if kind.statistics_of == "inputs":  # a matrix, with few columns: their Gram matrix is square
        shape = (max(shape), min(shape)) if len(shape) == 2 else (*shape, 1)
    base, *models = drawn(1 + min(kind.max_inputs or 3, 3), shape, dtype)
    has_base = kind.needs_base or kind.takes_base
    for i, tensor in enumerate([base, *models]):
        write(tmp_path / str(i), {"tensor": tensor}, None)
    values = told(name, models)
    own = [{} for _ in models]
    for i, one in enumerate(values.get("statistics", [])):
        write(tmp_path / f"of-{i}", {"tensor": one}, None)
        own[i] = {"statistics": str(tmp_path / f"of-{i}")}
    shared = {k.rstrip("_"): v for k, v in values.items() if k != "statistics"}
    recipe = {
        "merge_method": name,
        "models": [{"model": tmp_path / str(i + 1), "parameters": p} for i, p in enumerate(own)],
        "parameters": shared | more,
    }
    if has_base:
        recipe["base_model"] = tmp_path / "0"
    mk.merge(recipe, tmp_path / "out")
    merged = mk.merge_tensors(name, models, base=base if has_base else None, **values, **more)
    wanted = load_file(tmp_path / "out" / "model.safetensors")["tensor"]
    assert merged.dtype == wanted.dtype == dtype
    assert torch.equal(merged, wanted)


@pytest.mark.parametrize("name", MODEL_METHODS)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (2, 3, 4)])
def test_every_shape_is_merged(name, shape):
    kind = find(name)
    base, *models = drawn(1 + min(kind.max_inputs or 2, 2), shape)
    before = [tensor.clone() for tensor in (base, *models)]
    base_or_none = base if kind.takes_base else None
    values = told(name, models)
    if kind.statistics_of == "inputs" and len(shape) != 2:
        with pytest.raises(mk.MergeKitError, match="expected a matrix"):
            mk.merge_tensors(name, models, **values)
        return
    merged = mk.merge_tensors(name, models, base=base_or_none, **values)
    assert merged.shape == shape
    assert torch.isfinite(merged).all()
    assert all(map(torch.equal, before, (base, *models)))  # inputs stay as they are


def test_a_method_that_needs_a_base_takes_the_first_tensor():
    base, one, other = drawn(3, (5,))
    wanted = mk.merge_tensors("slerp", [one], base=base, t=0.3)
    assert torch.equal(mk.merge_tensors("slerp", [base, one], t=0.3), wanted)
    wanted = mk.merge_tensors("task_arithmetic", [one, other], base=base, weights=[0.5, 2.0])
    found = mk.merge_tensors("task_arithmetic", [base, one, other], weights=[0.5, 2.0])
    assert torch.equal(found, wanted)
    assert not torch.equal(mk.merge_tensors("linear", [base, one, other]), found)


def test_ten_million_elements():
    count = 10_000_000
    one, other = torch.arange(count, dtype=torch.float32), torch.ones(count)
    merged = mk.merge_tensors("linear", [one, other], weights=[0.5, 1.0], normalize=False)
    assert torch.equal(merged, one / 2 + 1)  # exact: halves of whole numbers below 2^24
    angle = mk.merge_tensors(
        "slerp", [torch.tensor([0.0, 1.0])], base=torch.tensor([1.0, 0.0]), t=0.5
    )
    assert angle.tolist() == pytest.approx([0.5**0.5] * 2, abs=2.0**-24)


TEN_MILLION = 10_000_000


@pytest.mark.parametrize(
    ("name", "told", "kept"),
    [
        ("magnitude", {"density": 0.25}, (7_500_000, TEN_MILLION)),
        ("ties", {"density": 0.25}, (7_500_000, TEN_MILLION)),
        ("breadcrumbs", {"density": 0.25, "gamma": 0.5}, (2_500_000, 5_000_000)),
    ],
)
def test_the_right_ones_of_ten_million_elements_are_kept(name, told, kept):
    numbers = torch.arange(TEN_MILLION, dtype=torch.float32)  # exact: whole numbers below 2^24
    merged = mk.merge_tensors(name, [numbers], base=torch.zeros(TEN_MILLION), **told)
    first, last = kept
    assert torch.equal(merged[first:last], numbers[first:last])
    assert int(merged.count_nonzero()) == last - first


def test_a_quarter_of_ten_million_elements_is_kept_at_random():
    ones = torch.ones(TEN_MILLION)
    merged = mk.merge_tensors("dare_linear", [ones], base=torch.zeros_like(ones), density=0.25)
    assert merged.unique().tolist() == [0.0, 4.0]
    # five standard deviations of a binomial share
    assert abs(int(merged.count_nonzero()) / TEN_MILLION - 0.25) < 5 * (0.1875 / TEN_MILLION) ** 0.5


def test_numbers_worked_by_hand():
    base, code, math = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0]), torch.tensor([1.0, 6.0])
    found = mk.merge_tensors("task_arithmetic", [code, math], base=base, weights=[0.5, 0.25])
    assert found.tolist() == [2.0, 3.0]
    found = mk.merge_tensors("task_arithmetic", [code], base=base, weight=1.0, lambda_=2.0)
    assert found.tolist() == [5.0, 2.0]
    assert mk.merge_tensors("linear", [base, code, math], weights=2.0).tolist() == pytest.approx(
        [5 / 3, 10 / 3], rel=2.0**-23
    )


def test_a_result_is_rounded_once_to_the_widest_input():
    one, other = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([2.0**-12])
    found = mk.merge_tensors("linear", [one, other], weights=[1.0, 1.0], normalize=False)
    assert (found.dtype, found.item()) == (torch.float32, 1 + 2.0**-12)
    half = torch.tensor([1.0], dtype=torch.float16)
    assert mk.merge_tensors("linear", [one, half], weights=1.0).dtype == torch.float32


def test_a_tensor_may_stand_twice_and_may_be_the_base_too():
    one, other = torch.tensor([1.0]), torch.tensor([4.0])
    assert mk.merge_tensors("linear", [one, one, other], weights=1.0).item() == 2.0
    merged = mk.merge_tensors("slerp", [one, other], base=one, t=0.5)  # one is the base, no model
    assert merged.item() == 2.5


def test_gradients_and_other_layouts_do_not_matter():
    one = torch.nn.Parameter(torch.arange(6.0).view(2, 3).T)
    merged = mk.merge_tensors("linear", [one], weights=1.0)
    assert not merged.requires_grad
    assert torch.equal(merged, one.detach())


@pytest.mark.parametrize(
    ("name", "tensors", "more", "kind", "problem"),
    [
        ("linaer", [torch.ones(1)], {}, mk.PlanError, "did you mean 'linear'"),
        ("slerp", [torch.ones(1)] * 2, {}, mk.UsageError, "slerp needs t"),
        ("slerp", [torch.ones(1)], {"t": 0.5}, mk.UsageError, "found no models"),
        ("slerp", torch.ones(2), {"t": 0.5}, mk.UsageError, "expected a list"),
        ("linear", [torch.ones(1)], {"weights": [1.0, 2.0]}, mk.UsageError, "2 values of weight"),
        ("linear", [torch.ones(1)], {"weight": 1, "weights": 1}, mk.UsageError, "one of them"),
        ("linear", [torch.ones(1)], {"t": 1}, mk.UsageError, "has no parameter 't'"),
        ("linear", [torch.ones(2), torch.ones(3)], {"weight": 1}, mk.MismatchError, "shape"),
        ("linear", [torch.ones(1)] * 2, {"weights": [1, -1]}, mk.MergeKitError, "sums to 0"),
        ("slerp", [], {"t": 0.5}, mk.UsageError, "slerp needs a base"),
        ("linear", [torch.tensor([torch.nan])], {"weight": 1}, mk.NonFiniteError, "1 NaN"),
        ("linear", [[1.0]], {"weight": 1}, mk.UsageError, "expected a torch.Tensor"),
    ],
)
def test_mistakes_are_told(name, tensors, more, kind, problem):
    with pytest.raises(kind, match=problem):
        mk.merge_tensors(name, tensors, **more)


def test_parameters_may_be_numbers_of_numpy_and_torch():
    one, two = torch.zeros(3), torch.ones(3)
    for weights in (np.array([1.0, 3.0]), torch.tensor([1.0, 3.0]), [np.float64(1), np.float32(3)]):
        assert mk.merge_tensors("linear", [one, two], weights=weights).tolist() == [0.75] * 3
    assert mk.merge_tensors("slerp", [one, two], t=np.float64(0.5)).tolist() == [0.5] * 3
