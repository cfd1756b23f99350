"""Adapters that are not finite, or become so: refused in words, or written and counted."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_kit import merge, plan
from merge_kit.errors import MergeKitError, NonFiniteError, PlanError
from tests.plan.adapters_by_hand import PREFIX, UP, Q, adapter, factors

FIRST, SECOND = Q.format(0), UP.format(0)
FITTED = [
    ("lora_linear", {}, 3),
    ("lora_svd", {"energy": 0.5}, 3),
    ("lora_knots", {"energy": 0.5}, 3),
    ("lora_ties", {"energy": 0.5, "density": 0.5}, 3),
    ("lora_dare", {"energy": 0.5, "density": 1}, 3),
]
fitted = pytest.mark.parametrize(("method", "parameters", "bound"), FITTED)


def pair(folder, *, bad=None, **config):
    """Write two adapters of two modules, one of them with a value of this kind in the first."""
    held = factors(FIRST, 3, 3) | factors(SECOND, 5, 3)
    if bad is not None:
        held[f"{FIRST}.lora_B.weight"][1, 0] = bad
    return adapter(folder / "odd", held, **config), adapter(folder / "even", held_of(held, bad))


def held_of(held, bad):
    other = {name: tensor + 1 for name, tensor in held.items()}
    return other if bad is None else {k: v.nan_to_num(0, 0, 0) for k, v in other.items()}


def recipe(method, folders, weights=(1.0, 1.0), **parameters):
    models = [
        {"model": str(folder), "parameters": {"weight": weight}}
        for folder, weight in zip(folders, weights, strict=True)
    ]
    return {"merge_method": method, "models": models, "parameters": parameters}


@fitted
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_module_that_is_not_finite_stops_the_look_at_it(tmp_path, method, parameters, bound, bad):
    del bound
    folders = pair(tmp_path, bad=bad)
    with pytest.raises(NonFiniteError) as caught:
        merge(recipe(method, folders, **parameters), tmp_path / "out")
    assert FIRST in caught.value.where
    assert "in input-1:odd" in caught.value.problem


@fitted
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_where_it_is_allowed_it_is_written_with_its_most_ranks_and_counted(
    tmp_path, method, parameters, bound, bad
):
    folders = pair(tmp_path, bad=bad)
    request = recipe(method, folders, **parameters)
    done = merge(request, tmp_path / "out", allow_nonfinite=True)
    held = load_file(tmp_path / "out/adapter_model.safetensors")
    a, b = (f"{PREFIX}{FIRST}.lora_{side}.weight" for side in "AB")
    assert held[a].shape == (bound, 3)
    assert held[b].shape == (3, bound)
    for name in (a, b):
        assert done.report.nonfinite[name] == int(held[name].isnan().sum()) > 0
    assert all(bool(t.isfinite().all()) for name, t in held.items() if SECOND in name)
    record = json.loads((tmp_path / "out/merge_kit.json").read_text(), parse_constant=pytest.fail)
    assert record["ranks"][FIRST] == bound


def test_an_alpha_that_overflows_names_the_module_and_the_adapter(tmp_path):
    folders = pair(tmp_path, lora_alpha=1e308)
    with pytest.raises(MergeKitError) as caught:
        plan(recipe("lora_concat", folders, (100.0, 1.0)))
    errors = caught.value.errors
    assert [type(error) for error in errors] == [PlanError, PlanError]
    assert {error.where for error in errors} == {FIRST, SECOND}
    assert errors[0].problem.startswith("input-1:odd has the scale 5e+307 (alpha 1e+308)")
    assert plan(recipe("lora_concat", folders, (1e-10, 1.0))).steps


def test_an_alpha_that_no_float32_holds_is_refused_where_it_is_a_tensor(tmp_path):
    held = {}
    for name in ("lora_unet_mid_block_proj_in", "lora_unet_mid_block_proj_out"):
        held[f"{name}.lora_down.weight"] = torch.ones(2, 3)
        held[f"{name}.lora_up.weight"] = torch.ones(4, 2)
        held[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(held, tmp_path / "x.safetensors")
    with pytest.raises(MergeKitError, match=r"above 3\.403e"):
        plan(recipe("lora_concat", [tmp_path / "x.safetensors"], (1e39,)))
    merge(recipe("lora_concat", [tmp_path / "x.safetensors"], (1e38,)), tmp_path / "out")
    found = load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert float(found["lora_unet_mid_block_proj_in.alpha"]) == pytest.approx(2e38)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("lora_linear", {}), ("lora_svd", {"rank": 2}), ("lora_svd", {"energy": 0.5})],
)
def test_sums_that_overflow_are_told_from_decompositions_that_fail(tmp_path, method, parameters):
    folders = pair(tmp_path, lora_alpha=1e308)
    request = recipe(method, folders, (100.0, 1.0), **parameters)
    with pytest.raises(NonFiniteError) as caught:
        merge(request, tmp_path / "out")
    assert "values that are NaN, infinite or too large for F32" in caught.value.problem
    assert "smaller weights" in caught.value.hint
    done = merge(request, tmp_path / "out", allow_nonfinite=True)
    assert any(FIRST in name for name in done.report.nonfinite)
