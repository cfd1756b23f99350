from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

import merge_kit as mk
from merge_kit.core.tensors import BLOCK
from merge_kit.methods import ops
from merge_kit.methods.base import MergeMethod, PerModel, Scan, Scans, Slab, per_model
from merge_kit.methods.reductions import Gram, Sum
from merge_kit.methods.registry import find, parameters
from tests.api.conftest import assert_same

pytestmark = pytest.mark.usefixtures("registered")


def clipped(
    tensors, base, *, limit: float = 1.0, weight: PerModel[float] = 0.5, flip: bool = False
):
    """Add weighted task vectors, each element at most so large."""
    total = base.clone()
    for tensor, w in zip(tensors, weight, strict=True):
        delta = (tensor - base).clamp(-limit, limit)
        total.add_(delta, alpha=-w if flip else w)
    return total


def test_a_function_is_a_method_of_recipes_tensors_and_functions(family, tmp_path):
    assert mk.method("clipped")(clipped) is clipped
    base, one, other = torch.tensor([0.0, 0.0]), torch.tensor([4.0, 0.5]), torch.tensor([0.0, 1.0])
    found = mk.merge_tensors("clipped", [one, other], base=base, limit=2.0, weights=[0.5, 1.0])
    assert found.tolist() == [1.0, 1.25]
    assert mk.merge_tensors("clipped", [one], base=base, flip=True).tolist() == [-0.5, -0.25]
    recipe = {
        "merge_method": "clipped",
        "base_model": family.path("base"),
        "models": [{"model": family.path("code"), "parameters": {"weight": 0.25}}],
        "parameters": {"limit": 0.125},
    }
    mk.merge(recipe, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("model.layers.0.w", "scale"):
        start, end = family.base[name].float(), family.code[name].float()
        wanted = start + (end - start).clamp(-0.125, 0.125) * 0.25
        assert torch.equal(merged[name], wanted.to(merged[name].dtype))
    same = mk.clipped([family.code], base=family.base, weight=0.25, limit=0.125).state_dict()
    assert torch.equal(same["model.layers.0.w"], merged["model.layers.0.w"])


def test_keyword_arguments_become_parameters():
    mk.method("clipped")(clipped)
    kind = find("clipped")
    rows = [(p.name, p.kind, p.per_model, p.required, p.default) for p in parameters(kind)]
    assert rows == [
        ("limit", float, False, False, 1.0),
        ("weight", float, True, False, 0.5),
        ("flip", bool, False, False, False),
    ]
    assert kind.needs_base
    assert kind.__doc__ == clipped.__doc__


def test_a_function_without_a_base_takes_it_as_a_model():
    @mk.method("largest")
    def largest(tensors, *, gain: float):
        return tensors.amax(0) * gain

    one, other = torch.tensor([1.0, 5.0]), torch.tensor([2.0, 3.0])
    assert mk.merge_tensors("largest", [one, other], gain=2.0).tolist() == [4.0, 10.0]
    assert mk.merge_tensors("largest", [one], base=other, gain=1.0).tolist() == [2.0, 5.0]
    with pytest.raises(mk.UsageError, match="largest needs gain"):
        mk.merge_tensors("largest", [one])


def test_a_base_with_a_default_is_optional():
    @mk.method("perhaps")
    def perhaps(tensors, base=None):
        return tensors[0] if base is None else tensors[0] - base

    one, other = torch.tensor([3.0]), torch.tensor([1.0])
    assert mk.merge_tensors("perhaps", [one]).item() == 3.0
    assert mk.merge_tensors("perhaps", [one], base=other).item() == 2.0


def test_a_dataclass_is_a_method():
    @mk.method("shifted")
    @dataclass(frozen=True, kw_only=True)
    class Shifted(MergeMethod):
        max_inputs: ClassVar[int | None] = 1
        laws: ClassVar[Mapping] = {}
        by: float = 1.0
        weight: PerModel[float] = per_model(1.0)

        def merge(self, slab: Slab, scans: Scans) -> torch.Tensor:
            return ops.weighted_sum(slab.tensors, self.weight) + self.by

    assert mk.merge_tensors("shifted", [torch.ones(2)], weights=2.0, by=0.5).tolist() == [2.5, 2.5]
    assert find("shifted") is Shifted


def test_a_function_sees_runs_of_elements_and_the_result_is_whole():
    seen = []

    @mk.method("looked_at")
    def looked_at(tensors):
        seen.append(tensors.shape[1])
        return tensors[0] + tensors[1]

    one, other = torch.arange(9.0 * BLOCK), torch.ones(9 * BLOCK)
    assert torch.equal(mk.merge_tensors("looked_at", [one, other]), one + 1)
    assert sum(seen) == 9 * BLOCK
    assert len(seen) > 1


def test_a_script_may_define_its_method_again():
    for number in (1.0, 2.0):

        @mk.method("again")
        def again(tensors, *, add: float = number):
            return tensors[0] + add

    assert mk.merge_tensors("again", [torch.zeros(1)]).item() == 2.0
    assert mk.again([{"x": torch.zeros(1)}]).state_dict()["x"].item() == 2.0


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda: None, "expected tensors, perhaps base, and names"),
        (lambda a, b, c: a, "expected tensors, perhaps base, and names"),
        (lambda *a: a, "expected tensors, perhaps base, and names"),
        (lambda a, **more: a, "expected tensors, perhaps base, and names"),
        (lambda a, *, much: a, "much of odd has the type"),
        (lambda a, *, much=[]: a[0], "much of odd has the type"),
        (MergeMethod, "no dataclass that derives from MergeMethod"),
        (dict, "dict is no dataclass"),
    ],
)
def test_other_forms_are_refused(function, problem):
    if function is MergeMethod:
        function = type("Bare", (MergeMethod,), {})
    with pytest.raises(mk.UsageError, match=problem):
        mk.method("odd")(function)


def test_names_of_the_package_are_not_replaced():
    with pytest.raises(mk.UsageError, match="linear is a method of merge_kit"):
        mk.method("linear")(lambda tensors: tensors[0])
    with pytest.raises(mk.UsageError, match="is no name of a method"):
        mk.method("my method")(lambda tensors: tensors[0])


def test_a_result_of_another_form_is_told():
    mk.method("summed")(lambda tensors: tensors.sum())
    with pytest.raises(
        mk.PlanError, match=r"summed: returned \[\] of torch.float32, expected \[2\]"
    ):
        mk.merge_tensors("summed", [torch.ones(2)])
    mk.method("widened")(lambda tensors: tensors[0].double())
    with pytest.raises(mk.PlanError, match=r"of torch\.float64, expected"):
        mk.merge_tensors("widened", [torch.ones(2)])


def test_statistics_over_the_whole_model_are_those_of_files(family, tmp_path):
    @mk.method("evened")
    @dataclass(frozen=True, kw_only=True)
    class Evened(MergeMethod):
        """Bring two models to one length over all tensors, and average them."""

        def scans(self) -> list[Scan]:
            return [Scan("all", Gram(), scope="model"), Scan("own", Sum())]

        def merge(self, slab: Slab, scans: Scans) -> torch.Tensor:
            one, other = scans["all"].diagonal().sqrt().tolist()
            assert scans["own"].shape == (2,)
            return ops.weighted_sum(slab.tensors, [1.0, one / other])

    recipe = {
        "merge_method": "evened",
        "models": [{"model": family.path("code")}, {"model": family.path("math")}],
    }
    mk.merge(recipe, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    found = mk.evened([family.code, family.math]).state_dict(threads=2)
    assert_same(found, merged)
    names = [name for name in family.code if name != "ids"]
    squares = [
        sum(float(model[name].double().square().sum()) for name in names)
        for model in (family.code, family.math)
    ]
    ratio = (squares[0] / squares[1]) ** 0.5
    wanted = family.code["scale"].double() + ratio * family.math["scale"].double()
    torch.testing.assert_close(found["scale"].double(), wanted, rtol=2.0**-8, atol=0)  # bfloat16
