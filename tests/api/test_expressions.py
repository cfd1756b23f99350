from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import merge_kit as mk
from tests.api.conftest import assert_same


def recipe(family, method, models, base=None, **parameters):
    """Return a recipe of models by name with a weight each."""
    made = {
        "merge_method": method,
        "models": [
            {"model": family.path(name), "parameters": {"weight": weight}}
            for name, weight in models.items()
        ],
        "parameters": parameters,
    }
    return made if base is None else {**made, "base_model": family.path(base)}


def everywhere(family):
    """Yield the family as models on disk, in memory, and mixed."""
    paths = [family.path(name) for name in ("base", "code", "math")]
    dicts = [family.base, family.code, family.math]
    for sources in (paths, dicts, [paths[0], *dicts[1:]], [dicts[0], *paths[1:]]):
        yield [mk.load(source) for source in sources]


def test_a_model_plus_task_vectors_is_task_arithmetic(family, tmp_path):
    wanted = recipe(family, "task_arithmetic", {"code": 0.8, "math": -0.3}, "base")
    mk.merge(wanted, tmp_path / "recipe")
    weights = (tmp_path / "recipe" / "model.safetensors").read_bytes()
    for i, (base, code, math) in enumerate(everywhere(family)):
        sum_ = base + 0.8 * (code - base) - mk.TaskVector(math, base) * 0.3
        assert_same(sum_.state_dict(), load_file(tmp_path / "recipe" / "model.safetensors"))
        sum_.save(tmp_path / str(i))
        assert (tmp_path / str(i) / "model.safetensors").read_bytes() == weights


def test_a_weighted_sum_of_models_is_linear_without_normalising(family, tmp_path):
    wanted = recipe(family, "linear", {"code": 0.5, "math": 0.25}, normalize=False)
    mk.merge(wanted, tmp_path / "recipe")
    for i, (_, code, math) in enumerate(everywhere(family)):
        (0.5 * code + math / 4).save(tmp_path / str(i))
        one, other = (tmp_path / n / "model.safetensors" for n in ("recipe", str(i)))
        assert one.read_bytes() == other.read_bytes()


def test_a_task_vector_of_another_base_is_a_sum_of_three_models():
    chat, code, base = (mk.load({"x": torch.tensor([n])}) for n in (10.0, 5.0, 1.0))
    moved = chat + 0.5 * mk.TaskVector(code, base)
    assert moved.state_dict()["x"].item() == 10 + 0.5 * (5 - 1)
    assert (mk.TaskVector(code, base) + chat).state_dict()["x"].item() == 14.0


def test_sums_take_equal_terms_together():
    one, two = (mk.load({"x": torch.tensor([n])}) for n in (1.0, 2.0))
    assert (one + one).state_dict()["x"].item() == 2.0
    assert sum([one, two, two]).state_dict()["x"].item() == 5.0
    assert (-(one - 2 * two) / 2).state_dict()["x"].item() == 1.5
    tasks = sum([two - one, two - one])
    assert isinstance(tasks, mk.TaskVector)
    assert (one + tasks).state_dict()["x"].item() == 3.0


def test_what_is_saved_beside_weights_in_memory_comes_from_a_base_on_disk(family, tmp_path):
    base, code = mk.load(family.path("base")), mk.load(family.code)
    (base + (code - base)).save(tmp_path / "with")
    assert sorted(p.name for p in (tmp_path / "with").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    (code + (base - code)).save(tmp_path / "without")
    assert [p.name for p in (tmp_path / "without").iterdir()] == ["model.safetensors"]


def test_saving_is_all_or_nothing(family, tmp_path):
    base, bad = mk.load(family.base), mk.load({**family.code, "scale": torch.tensor(torch.inf)})
    out = tmp_path / "out"
    with pytest.raises(mk.NonFiniteError, match="scale"):
        (base + (bad - base)).save(out)
    assert list(tmp_path.iterdir()) == []
    (base + (bad - base)).save(out, allow_nonfinite=True)
    with pytest.raises(mk.OutputExistsError):
        (0.5 * base).save(out)
    (0.5 * base).save(out, overwrite=True, dtype=torch.float32, shard_size=300_000)
    assert (out / "model.safetensors.index.json").is_file()
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) == 3
    halves = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert torch.equal(halves["scale"], family.base["scale"].float() * 0.5)
    assert torch.equal(halves["ids"], family.base["ids"])


def test_an_input_is_never_replaced(family):
    with pytest.raises(mk.OutputExistsError, match="is the input"):
        (0.5 * mk.load(family.path("base")) + mk.load(family.code)).save(
            family.path("base"), overwrite=True
        )


def test_the_dtype_of_a_result_can_be_chosen(family):
    model = mk.load(family.path("base"))
    for dtype in (torch.float64, "float64"):
        found = (1.0 * model).state_dict(dtype=dtype)
        assert found["model.layers.1.w"].dtype == torch.float64
        assert torch.equal(found["model.layers.1.w"], family.base["model.layers.1.w"].double())
    with pytest.raises(mk.UsageError, match="found the dtype 'float46'"):
        (1.0 * model).state_dict(dtype="float46")


def test_results_are_ordinary_tensors_of_their_own(family):
    found = (1.0 * mk.load(family.base)).state_dict()
    assert not any(tensor.is_inference() for tensor in found.values())
    found["ids"].zero_()
    found["scale"].zero_()
    assert family.base["ids"].tolist() == [0, 1, 2, 3, 4]


def test_models_that_do_not_fit_are_refused_by_name():
    one = mk.load({"x": torch.ones(2), "y": torch.ones(2)})
    with pytest.raises(mk.MismatchError, match="lacks 1 tensors that input-1 has: y"):
        (one + mk.load({"x": torch.ones(2)})).state_dict()
    with pytest.raises(mk.MismatchError, match="shape"):
        (one + mk.load({"x": torch.ones(3), "y": torch.ones(2)})).state_dict()


def test_integers_that_differ_are_refused_in_memory_too():
    one, other = (mk.load({"i": torch.tensor([1, n])}) for n in (2, 3))
    with pytest.raises(mk.MismatchError, match="values differ between input-1 and input-2"):
        (one + other).state_dict()


def test_factors_are_finite_numbers():
    model = mk.load({"x": torch.ones(1)})
    with pytest.raises(mk.UsageError, match="found the factor nan"):
        model * float("nan")
    with pytest.raises(mk.UsageError, match="divisor 0"):
        model / 0
    with pytest.raises(TypeError):
        model + 1
    with pytest.raises(TypeError):
        mk.TaskVector(model, model) * "2"
