from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import merge_kit as mk
from merge_kit.core.tensors import BLOCK
from tests.api.conftest import SHAPES, assert_same
from tests.toys import write


def everywhere(family):
    """Yield the family as models on disk and in memory."""
    names = ("base", "code", "math")
    yield [mk.load(family.path(name)) for name in names]
    yield [mk.load(getattr(family, name)) for name in names]


def vector(*numbers: float) -> mk.TaskVector:
    return mk.TaskVector({"w": torch.tensor(numbers)}, {"w": torch.zeros(len(numbers))})


def test_pruning_by_magnitude_worked_by_hand():
    task = vector(1.0, -4.0, 2.0, 0.5)
    assert task.prune(0.5).state_dict()["w"].tolist() == [0.0, -4.0, 2.0, 0.0]
    assert task.prune(0.0).state_dict()["w"].tolist() == [0.0] * 4
    assert task.prune(1.0).state_dict()["w"].tolist() == [1.0, -4.0, 2.0, 0.5]
    assert vector(1.0, -1.0, 1.0).prune(0.4).state_dict()["w"].tolist() == [1.0, 0.0, 0.0]


def test_a_sum_is_pruned_as_a_whole_and_pruned_sums_add():
    both = (vector(1.0, 3.0, 0.0) + 2 * vector(1.0, -1.0, 2.0)).prune(0.67)  # of [3, 1, 4]
    assert both.state_dict()["w"].tolist() == [3.0, 0.0, 4.0]
    total = both.prune(0.34) - vector(1.0, 1.0, 1.0)
    assert total.state_dict()["w"].tolist() == [-1.0, -1.0, 3.0]


def test_the_whole_model_is_ranked_at_once_if_asked():
    task = mk.TaskVector(
        {"a": torch.tensor([9.0, 8.0]), "b": torch.tensor([1.0, 2.0])},
        {"a": torch.zeros(2), "b": torch.zeros(2)},
    )
    by_tensor, over_all = task.prune(0.5), task.prune(0.5, scope="model")
    assert [t.tolist() for t in by_tensor.state_dict().values()] == [[9.0, 0.0], [0.0, 2.0]]
    assert [t.tolist() for t in over_all.state_dict().values()] == [[9.0, 8.0], [0.0, 0.0]]
    assert over_all.prune(0.5).state_dict()["a"].tolist() == [9.0, 0.0]
    with pytest.raises(mk.UsageError, match="pruned by tensor is pruned again over the whole"):
        by_tensor.prune(0.5, scope="model")


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_a_base_plus_pruned_task_vectors_is_the_method_magnitude(family, tmp_path, scope):
    for base, code, math in everywhere(family):
        wanted = mk.magnitude(
            base, [code, math], weight=[0.5, -2.0], density=[0.3, 0.6], scope=scope
        ).state_dict()
        one, other = (code - base).prune(0.3, scope=scope), (math - base).prune(0.6, scope=scope)
        assert_same((base + 0.5 * one - 2 * other).state_dict(), wanted)
        mixed = 2 * ((base + 0.5 * one - 2 * other) / 2)  # no method says that any more
        assert_same(mixed.state_dict(), wanted)


def test_random_pruning_is_that_of_dare_linear(family):
    for base, code, math in everywhere(family):
        one, other = code - base, math - base
        wanted = mk.dare_linear(base, [code, math], weight=[0.5, 2.0], density=0.3, seed=7)
        first = one.prune(0.3, how="random", seed=7)
        second = other.prune(0.3, how="random", seed=7, position=1)
        assert_same((base + 0.5 * first + 2 * second).state_dict(), wanted.state_dict())
        moved = base + 2 * second + 0.5 * first  # the choices go by position, not by order
        found = moved.state_dict(dtype="float64")["model.layers.0.w"]
        wanted = wanted.state_dict(dtype="float64")["model.layers.0.w"]
        torch.testing.assert_close(found, wanted, rtol=0, atol=2.0**-18)


def test_random_pruning_keeps_the_mean():
    ones = mk.TaskVector({"w": torch.ones(100_000)}, {"w": torch.zeros(100_000)})
    kept = ones.prune(0.25, how="random", seed=3).state_dict()["w"]
    assert set(kept.tolist()) == {0.0, 4.0}
    # 4 x a binomial share of p = 1/4: five standard deviations of 4 sqrt(p (1 - p) / n)
    assert abs(float(kept.double().mean()) - 1) < 5 * 4 * (0.1875 / 100_000) ** 0.5


def test_a_pruned_sum_on_disk_and_in_memory_is_the_same_bytes(family, tmp_path):
    for i, (base, code, math) in enumerate(everywhere(family)):
        total = base + 0.5 * ((code - base) + (math - base)).prune(0.2, scope="model")
        out = total.save(tmp_path / str(i), shard_size=300_000, dtype="float32")
        assert_same(total.state_dict(dtype="float32"), mk.load(out).state_dict())
    disk, memory = (sorted((tmp_path / n).glob("model*")) for n in ("0", "1"))
    assert [p.name for p in disk] == [p.name for p in memory]
    assert len(disk) == 4  # three shards and their index
    assert [p.read_bytes() for p in disk] == [p.read_bytes() for p in memory]
    assert (tmp_path / "0" / "config.json").is_file()


def test_a_task_vector_is_saved_and_loaded_again(family, tmp_path):
    for i, (base, code, _) in enumerate(everywhere(family)):
        task = code - base
        out = task.save(tmp_path / str(i))
        loaded = mk.TaskVector.load(out)
        assert_same(loaded.state_dict(), task.state_dict())
        assert_same((base + 0.5 * loaded).state_dict(), (base + 0.5 * task).state_dict())
        (base + 0.5 * loaded).save(tmp_path / f"{i}-applied")
        (base + 0.5 * task).save(tmp_path / f"{i}-direct")
        one, other = (tmp_path / f"{i}-{n}" / "model.safetensors" for n in ("applied", "direct"))
        assert one.read_bytes() == other.read_bytes()
        assert loaded.cosine(task) == pytest.approx(1.0, abs=1e-15)
    assert {p.name for p in (tmp_path / "0").iterdir()} == {
        "config.json",
        "delta.safetensors",
        "merge_kit_delta.json",
    }
    marker = json.loads((tmp_path / "0" / "merge_kit_delta.json").read_text())
    assert marker == {
        "format": 1,
        "bases": ["base"],
        "models": ["code"],
        "pruned": [],
    }
    weights = [(tmp_path / n / "delta.safetensors").read_bytes() for n in "01"]
    assert weights[0] == weights[1]


def test_a_saved_delta_can_be_sparse_and_narrow(family, tmp_path):
    base, code = mk.load(family.path("base")), mk.load(family.path("code"))
    out = (code - base).prune(0.1, scope="model").save(tmp_path / "d", dtype="bfloat16")
    found = mk.TaskVector.load(out)
    total = sum(t.numel() for t in found.state_dict().values())
    kept = sum(int(t.count_nonzero()) for t in found.state_dict().values())
    assert kept == int(0.1 * total)
    assert load_file(out / "delta.safetensors")["model.layers.0.w"].dtype == torch.bfloat16
    assert json.loads((out / "merge_kit_delta.json").read_text())["pruned"] == [
        {"density": 0.1, "how": "magnitude"}
    ]
    again = (found - mk.TaskVector.load(out)).norm()
    assert again == 0.0


def test_a_folder_of_differences_is_no_model(family, tmp_path):
    base = mk.load(family.path("base"))
    out = (mk.load(family.path("code")) - base).save(tmp_path / "delta")
    with pytest.raises(mk.UsageError, match="holds the differences of a task vector"):
        mk.load(out)
    with pytest.raises(mk.CheckpointError, match="there is no merge_kit_delta"):
        mk.TaskVector.load(family.path("base"))
    (out / "merge_kit_delta.json").write_text('{"format": 2}')
    with pytest.raises(mk.CheckpointError, match="has format 2, expected 1"):
        mk.TaskVector.load(out)
    with pytest.raises(mk.OutputExistsError):
        (mk.load(family.path("code")) - base).save(tmp_path / "delta")


def test_the_base_decides_the_dtype_where_differences_are_added(family, tmp_path):
    base, code = mk.load(family.path("base")), mk.load(family.path("code"))
    loaded = mk.TaskVector.load((code - base).save(tmp_path / "delta"))
    for name in SHAPES:
        assert (base + loaded).state_dict()[name].dtype == family.base[name].dtype
    assert (base + loaded).state_dict(dtype="float64")["scale"].dtype == torch.float64


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        ({"density": 1.5}, "density is 1.5, expected a number in"),
        ({"density": "a"}, "density is 'a', expected a number in"),
        ({"density": float("nan")}, "density is nan, expected"),
        ({"density": 0.5, "how": "size"}, "how is 'size', expected 'magnitude' or 'random'"),
        ({"density": 0.5, "scope": "layer"}, "scope is 'layer', expected 'tensor' or 'model'"),
        ({"density": 0.5, "how": "random", "scope": "model"}, "each element by itself"),
    ],
)
def test_mistakes_in_pruning_are_told_at_once(told, problem):
    with pytest.raises(mk.UsageError, match=problem):
        vector(1.0).prune(**told)


def test_infinity_stops_before_it_takes_a_place_among_the_largest(tmp_path):
    broken = torch.ones(2 * BLOCK)
    broken[-1] = torch.inf
    write(tmp_path / "a", {"w": broken}, None)
    write(tmp_path / "b", {"w": torch.zeros(2 * BLOCK)}, None)
    task = mk.load(tmp_path / "a") - mk.load(tmp_path / "b")
    with pytest.raises(mk.NonFiniteError, match="w"):
        task.prune(0.5).state_dict()
    with pytest.raises(mk.NonFiniteError, match="w"):
        task.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
