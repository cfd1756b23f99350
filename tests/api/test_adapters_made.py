"""Adapters that the library makes, against dense sums and recipes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import merge_kit as mk
from tests.api.conftest import assert_same
from tests.api.low_rank import EMBED, SHAPES, Made, Q, added, assert_near, factors, size, weights
from tests.toys import write


def test_a_concatenation_is_the_sum(made, tmp_path):
    both = mk.lora_concat([made.path("sort"), made.path("add")], weight=[1.0, -0.5])
    assert "lora_concat" in repr(both)
    assert {rank.rank for rank in both.plan().ranks} == {2, 4}
    folder = both.save(tmp_path / "both")
    assert_same(both.state_dict(), load_file(folder / "adapter_model.safetensors"))
    found = mk.TaskVector.from_adapter(folder).state_dict()
    names = {**made.sort, **made.add}
    zeros = {name: torch.zeros(SHAPES[name]).double() for name in names}
    wanted = {n: {**zeros, **made.sort}[n] - 0.5 * {**zeros, **made.add}[n] for n in names}
    assert_near(found, wanted, size(made.sort), size(made.add))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("lora_concat", {"weight": [1.0, -0.5]}),
        ("lora_linear", {"weight": 0.5}),
        ("lora_svd", {"rank": 3}),
        ("lora_svd", {"energy": 0.9}),
        ("lora_ties", {"density": 0.5, "rank": 3}),
        ("lora_dare", {"density": 0.5, "rank": 3, "seed": 7}),
        ("lora_knots", {"rank": 3}),
    ],
)
def test_adapters_have_the_bytes_of_their_recipe(made, tmp_path, name, parameters):
    paths = [made.path("sort"), made.path("add")]
    made_by = getattr(mk, name)(paths, **parameters)
    made_by.save(tmp_path / "library")
    told = dict(parameters)
    weight = told.pop("weight", 1.0)
    own = weight if isinstance(weight, list) else [weight] * 2
    recipe = {
        "merge_method": name,
        "seed": told.pop("seed", 0),
        "models": [
            {"model": str(path), "parameters": {"weight": w}}
            for path, w in zip(paths, own, strict=True)
        ],
        "parameters": told,
    }
    mk.merge(recipe, tmp_path / "recipe")
    assert weights(tmp_path / "library") == weights(tmp_path / "recipe")
    for file in ("adapter_config.json",):
        assert (tmp_path / "library" / file).read_bytes() == (
            tmp_path / "recipe" / file
        ).read_bytes()
    assert_same(made_by.state_dict(), load_file(tmp_path / "library" / "adapter_model.safetensors"))


def test_an_adapter_minus_itself_is_zero(made):
    found = mk.lora_concat([made.path("sort"), made.path("sort")], weight=[1.0, -1.0]).state_dict()
    assert found
    b = [tensor for name, tensor in found.items() if "_B" in name]
    assert all(torch.count_nonzero(tensor) == 0 for tensor in b)


def test_loaded_adapters_and_other_dtypes_are_taken(made, tmp_path):
    one = mk.lora_concat([mk.load(made.path("sort"))])
    assert_same(one.state_dict(), factors(100, (*Q, EMBED)))
    narrow = one.state_dict(dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in narrow.values()} == {torch.bfloat16}
    one.save(tmp_path / "one")
    with pytest.raises(mk.OutputExistsError):
        one.save(tmp_path / "one")
    one.save(tmp_path / "one", overwrite=True)


def test_what_adapters_are_made_of_is_checked(made):
    with pytest.raises(mk.UsageError, match="made of what is on disk"):
        mk.lora_concat([made.base]).recipe()
    with pytest.raises(mk.UsageError, match="found no models"):
        mk.lora_concat([])
    with pytest.raises(mk.UsageError, match="expected a list"):
        mk.lora_concat(made.path("sort"))
    with pytest.raises(mk.UsageError, match="did you mean 'weight'"):
        getattr(mk, "lora_concat")([made.path("sort")], wieght=1)  # noqa: B009  (checked at run time)
    with pytest.raises(mk.MergeKitError, match="base"):
        mk.lora_concat([made.path("base")]).plan()
    with pytest.raises(mk.UsageError, match="lora_svd makes adapters, and no tensors"):
        mk.merge_tensors("lora_svd", [torch.ones(2, 2)])


# A fine-tune as an adapter


def low_rank_change(made: Made) -> dict[str, Tensor]:
    """Return a fine-tune of the base whose linear layers changed by two directions each."""
    fine = added(made.base, (1.0, made.add))
    return {n: fine[n].float() if t.is_floating_point() else t for n, t in made.base.items()}


def test_a_change_of_low_rank_is_recovered(made, tmp_path):
    write(tmp_path / "fine", low_rank_change(made), {"model_type": "toy"})
    adapter = mk.extract(tmp_path / "fine", made.path("base"), rank=2)
    folder = adapter.save(tmp_path / "adapter")
    assert_same(adapter.state_dict(), load_file(folder / "adapter_model.safetensors"))
    found = mk.TaskVector.from_adapter(folder).state_dict()
    assert found.keys() == made.add.keys()
    for name, delta in made.add.items():
        assert float((found[name] - delta).norm() / delta.norm()) < 1e-5, name


@pytest.mark.parametrize("asked", [{"rank": 1}, {"energy": 0.9}])
def test_an_extraction_has_the_bytes_of_its_recipe(made, tmp_path, asked):
    paths = made.path("code"), made.path("base")
    mk.extract(*paths, rest="drop", **asked).save(tmp_path / "library")
    recipe = {
        "merge_method": "lora_extract",
        "base_model": str(paths[1]),
        "models": [{"model": str(paths[0])}],
        "parameters": {"rest": "drop", **asked},
    }
    mk.merge(recipe, tmp_path / "recipe")
    assert weights(tmp_path / "library") == weights(tmp_path / "recipe")
    by_method = mk.lora_extract(paths[1], [paths[0]], rest="drop", **asked)
    assert_same(by_method.state_dict(), mk.load(tmp_path / "library").state_dict())


def test_what_an_extraction_needs_is_checked(made):
    with pytest.raises(mk.MergeKitError, match="rank and energy are both missing"):
        mk.extract(made.path("code"), made.path("base")).plan()
    with pytest.raises(mk.UsageError, match="made of what is on disk"):
        mk.extract(made.code, made.path("base"), rank=1).plan()
    with pytest.raises(mk.UsageError, match="lora_extract needs a base"):
        mk.lora_extract([made.path("code")], rank=1)


def test_a_model_with_an_adapter_is_extracted_too(made, tmp_path):
    on_top = mk.load(made.path("base")).with_adapter(made.path("add"), weight=0.5)
    folder = mk.extract(on_top, made.path("base"), rank=2).save(tmp_path / "half")
    found = mk.TaskVector.from_adapter(folder).state_dict()
    for name, delta in made.add.items():
        assert float((found[name] - 0.5 * delta).norm() / delta.norm()) < 1e-6, name
