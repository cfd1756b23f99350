from __future__ import annotations

import inspect

import pytest
import torch
from safetensors.torch import load_file

import merge_kit as mk
from tests.api.conftest import assert_same


def test_functions_have_the_parameters_of_their_methods():
    found = inspect.signature(mk.task_arithmetic).parameters
    names = ["first", "models", "base", "seed", "weight", "normalize", "lambda_"]
    assert list(found) == names
    assert found["weight"].default == 1.0
    assert inspect.signature(mk.slerp).parameters["t"].default is inspect.Parameter.empty
    assert (found["normalize"].default, found["lambda_"].default) == (False, 1.0)
    assert found["lambda_"].annotation == "float | Sequence[float]"
    assert "task vectors" in inspect.getdoc(mk.task_arithmetic)
    assert mk.linear is mk.linear


def test_a_list_has_one_weight_a_model_and_a_number_is_for_all(family, tmp_path):
    models = [family.path("code"), family.path("math")]
    own = mk.linear(models, weight=[1.0, 3.0]).state_dict()["model.layers.1.w"]
    code, math = (m["model.layers.1.w"].double() for m in (family.code, family.math))
    # float16 has 11 bits; one rounding errs by half of the last one
    torch.testing.assert_close(own.double(), (code + 3 * math) / 4, rtol=2.0**-11, atol=2.0**-24)
    same = mk.linear(models, weight=5.0)
    assert_same(same.state_dict(), mk.linear(models, weight=[1.0, 1.0]).state_dict())


def test_the_base_may_come_first_and_weights_are_one_each(family):
    base, code, math = family.base, family.code, family.math
    wanted = mk.task_arithmetic([code, math], base=base, weight=[1.0, 1.0]).state_dict()
    assert_same(mk.task_arithmetic(base, [code, math]).state_dict(), wanted)
    assert_same(mk.task_arithmetic(models=[code, math], base=base).state_dict(), wanted)
    assert_same(mk.linear([code]).state_dict(), code)


def test_paths_mappings_and_loaded_models_may_be_mixed(family, tmp_path):
    wanted = mk.slerp([family.path("code")], base=family.path("base"), t=0.3)
    found = mk.slerp([mk.load(family.path("code"))], base=family.base, t=0.3)
    assert_same(wanted.state_dict(), found.state_dict())
    wanted.save(tmp_path / "files")
    found.save(tmp_path / "mixed")
    one, other = (tmp_path / n / "model.safetensors" for n in ("files", "mixed"))
    assert one.read_bytes() == other.read_bytes()
    assert_same(load_file(one), wanted.state_dict())


def test_a_list_for_another_parameter_spans_the_layers(family):
    found = mk.slerp([family.code], base=family.base, t=[0.0, 1.0]).state_dict()
    for layer, model in ((0, family.base), (1, family.code)):
        assert torch.equal(found[f"model.layers.{layer}.w"], model[f"model.layers.{layer}.w"])


def test_passthrough_copies_bits(family):
    assert_same(mk.passthrough([family.path("base")]).state_dict(), family.base)
    doubled = mk.passthrough([family.base], scale=2.0).state_dict()
    assert torch.equal(doubled["scale"], family.base["scale"] * 2)


def test_a_base_among_the_models_is_no_task_of_its_own(family):
    alone = mk.task_arithmetic([family.code], base=family.base, weight=0.5)
    both = mk.task_arithmetic([family.base, family.code], base=family.base, weight=[9.0, 0.5])
    assert_same(alone.state_dict(), both.state_dict())


def test_a_merge_on_disk_is_a_whole_output(family, tmp_path):
    out = mk.linear([family.path("code"), family.path("math")], weight=1.0).save(tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {
        "README.md",
        "config.json",
        "merge_kit.json",
        "model.safetensors",
    }
    assert str(family.folder) not in (out / "merge_kit.json").read_text()


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda a: mk.linear([a], wieght=1.0), "did you mean 'weight'"),
        (lambda a: mk.slerp(a, [a]), "slerp needs t"),
        (lambda a: mk.linear([a], weight=[]), "0 values of weight for 1 models"),
        (lambda a: mk.slerp([a], t=0.5), "slerp needs a base"),
        (lambda a: mk.slerp(a, [a], base=a, t=0.5), "found the base twice"),
        (lambda a: mk.slerp([a], [a], t=0.5), "found a list in the place of the base"),
        (lambda a: mk.linear(), "models of type NoneType, expected a list"),
        (lambda a: mk.linear([mk.load(a) - mk.load(a)]), "found a TaskVector"),
        (lambda a: mk.linear([a, a], weight=1.0), "the same model stands twice"),
        (lambda a: mk.linear(a, weight=1.0), "expected a list"),
    ],
)
def test_mistakes_in_a_call_are_told_at_once(family, call, problem):
    with pytest.raises(mk.UsageError, match=problem):
        call(family.base)


def test_wrong_values_are_told_before_anything_is_read(family):
    with pytest.raises(mk.RecipeError, match="t is 'x', expected a finite number"):
        mk.slerp([family.path("code")], base=family.path("base"), t="x").state_dict()
