"""The changes of adapters in arithmetic, against dense matrices in float64."""

from __future__ import annotations

import pytest
import torch

import merge_kit as mk
from tests.api.conftest import assert_same
from tests.api.low_rank import (
    SHAPES,
    Q,
    added,
    assert_near,
    deltas,
    draw,
    factors,
    size,
    weights,
    write_adapter,
)


def test_the_task_vector_of_a_model_with_an_adapter_is_exact(made):
    # Weights of 1e4 would round a difference in float32 to multiples of 0.001.
    base = {n: t * 1e4 if t.is_floating_point() else t for n, t in made.base.items()}
    with_adapter = mk.load(base).with_adapter(made.path("sort"))
    found = mk.TaskVector(with_adapter, base).state_dict()
    zeros = {name: torch.zeros(shape).double() for name, shape in SHAPES.items()}
    assert_near(found, {**zeros, **made.sort}, size(made.sort))
    by_text = mk.TaskVector(made.on_base("sort"), made.path("base")).state_dict()
    assert_same(by_text, found)
    alone = mk.TaskVector(made.path("sort"), made.path("base")).state_dict()
    assert_same(alone, found)


def test_what_a_second_adapter_adds_is_exact(made):
    base = mk.load({n: t * 1e4 if t.is_floating_point() else t for n, t in made.base.items()})
    one = base.with_adapter(made.path("sort"))
    found = (one.with_adapter(made.path("add"), 2.0) - one).state_dict()
    zeros = {name: torch.zeros(shape).double() for name, shape in SHAPES.items()}
    twice = {name: 2 * delta for name, delta in made.add.items()}
    assert_near(found, {**zeros, **twice}, size(twice))


def test_an_adapter_is_a_task_vector(made):
    found = mk.TaskVector.from_adapter(made.path("sort")).state_dict()
    assert_near(found, made.sort, size(made.sort))
    half = mk.TaskVector.from_adapter(made.path("sort"), weight=-0.5).state_dict()
    assert_same(half, {name: -0.5 * tensor for name, tensor in found.items()})


def test_a_base_plus_an_adapter_is_the_merge(made, tmp_path):
    base, task = mk.load(made.path("base")), mk.TaskVector.from_adapter(made.path("sort"))
    (base + task).save(tmp_path / "sum")
    recipe = {"merge_method": "passthrough", "models": [{"model": made.on_base("sort")}]}
    mk.merge(recipe, tmp_path / "merged")
    assert weights(tmp_path / "sum") == weights(tmp_path / "merged")
    assert_same(
        (mk.load(made.base) + task).state_dict(), base.with_adapter(made.path("sort")).state_dict()
    )


def test_a_negative_adapter_forgets(made):
    base, task = mk.load(made.path("base")), mk.TaskVector.from_adapter(made.path("sort"))
    wanted = added(made.base, (-1.0, made.sort))
    assert_near((base - task).state_dict(), wanted, made.base, size(made.sort))
    assert_near((base + -task).state_dict(), wanted, made.base, size(made.sort))
    back = (base + task - task).state_dict()
    assert_same(back, made.base)


def test_adapters_and_fine_tunes_add_up(made, tmp_path):
    base = mk.load(made.path("base"))
    task = mk.TaskVector.from_adapter(made.path("sort"))
    merge = base + 0.8 * task + 0.4 * mk.TaskVector(made.path("code"), base)
    change = {n: made.code[n].double() - made.base[n].double() for n in SHAPES}
    wanted = added(made.base, (0.8, made.sort), (0.4, change))
    assert_near(merge.state_dict(), wanted, made.base, made.base, made.code, size(made.sort))
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(made.path("base")),
        "models": [
            {"model": made.on_base("sort"), "parameters": {"weight": 0.8}},
            {"model": str(made.path("code")), "parameters": {"weight": 0.4}},
        ],
    }
    merge.save(tmp_path / "library")
    mk.merge(recipe, tmp_path / "recipe")
    assert weights(tmp_path / "library") == weights(tmp_path / "recipe")


def test_the_base_of_other_differences_is_that_of_an_adapter(made):
    both = mk.TaskVector(made.code, made.base) - 0.5 * mk.TaskVector.from_adapter(made.path("add"))
    found = both.state_dict()
    change = {n: made.code[n].double() - made.base[n].double() for n in SHAPES}
    wanted = {n: d - 0.5 * made.add.get(n, torch.zeros(())) for n, d in change.items()}
    assert_near(found, wanted, made.base, made.code, size(made.add))


def test_adapters_alone_add_up_by_their_own_names(made):
    one, other = (mk.TaskVector.from_adapter(made.path(name)) for name in ("sort", "add"))
    names = {**made.sort, **made.add}
    zeros = {name: torch.zeros(SHAPES[name]).double() for name in names}
    wanted = {n: {**zeros, **made.sort}[n] - 2 * {**zeros, **made.add}[n] for n in names}
    assert_near(
        (one - 2 * other).state_dict(), wanted, size(made.sort), size(made.add), size(made.add)
    )
    assert one.norm() == pytest.approx(
        sum(float(d.square().sum()) for d in made.sort.values()) ** 0.5
    )
    dot = sum(float((made.sort[n] * made.add[n]).sum()) for n in made.sort if n in made.add)
    both = one.norm() * other.norm()
    assert one.cosine(other) == pytest.approx(dot / both, abs=1e-6)
    assert one.cosine(other) == pytest.approx(
        mk.compare_adapters([made.path("sort"), made.path("add")]).pair().cosine, abs=1e-6
    )


def test_the_change_of_an_adapter_is_pruned_like_any_other(made):
    kept = mk.TaskVector.from_adapter(made.path("sort")).prune(0.25).state_dict()
    for name, tensor in kept.items():
        count = round(0.25 * tensor.numel())
        assert int((tensor != 0).sum()) == count
        least = made.sort[name].abs().flatten().sort(descending=True).values[count - 1]
        assert torch.all(made.sort[name].abs()[tensor != 0] >= least * (1 - 1e-6))
    base = mk.load(made.path("base"))
    task = mk.TaskVector.from_adapter(made.path("add")).prune(0.25)
    assert_same(
        (base + task).state_dict(),
        mk.magnitude(base, [made.on_base("add")], density=0.25).state_dict(),
    )


def test_the_change_of_an_adapter_is_saved_and_loaded(made, tmp_path):
    task = mk.TaskVector.from_adapter(made.path("sort"))
    task.save(tmp_path / "alone")
    assert_same(mk.TaskVector.load(tmp_path / "alone").state_dict(), task.state_dict())
    of_base = mk.TaskVector(made.on_base("sort"), made.path("base"))
    of_base.save(tmp_path / "change")
    assert (tmp_path / "change" / "config.json").exists()
    found = (mk.load(made.path("base")) + mk.TaskVector.load(tmp_path / "change")).state_dict()
    assert_same(found, mk.load(made.on_base("sort")).state_dict())


def test_dora_needs_its_base(made, tmp_path):
    tensors = factors(100, (Q[0],))
    lengths = draw(9, 6).abs() + 1
    tensors[f"base_model.model.{Q[0]}.lora_magnitude_vector"] = lengths
    folder = write_adapter(tmp_path / "dora", tensors, use_dora=True)
    with pytest.raises(mk.UsageError, match="what DoRA changes depends on the weights"):
        mk.TaskVector.from_adapter(folder).state_dict()
    base = made.base[f"{Q[0]}.weight"].double()
    changed = base + deltas(tensors)[f"{Q[0]}.weight"]
    wanted = lengths.double()[:, None] * changed / changed.norm(dim=1, keepdim=True)
    found = mk.load(made.path("base")).with_adapter(folder).tensor(f"{Q[0]}.weight")
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    task = mk.TaskVector(mk.load(made.base).with_adapter(folder), made.base)
    difference = task.state_dict()[f"{Q[0]}.weight"].double()
    torch.testing.assert_close(difference, wanted - base, rtol=1e-5, atol=1e-5)
    sum_of_both = mk.load(made.path("base")) + mk.TaskVector.from_adapter(folder)
    torch.testing.assert_close(
        sum_of_both.state_dict()[f"{Q[0]}.weight"].double(), wanted, rtol=1e-5, atol=1e-5
    )


def test_tensors_held_whole_need_a_base(made, tmp_path):
    tensors = {**factors(100, (Q[0],)), "base_model.model.model.norm.weight": torch.ones(4)}
    folder = write_adapter(tmp_path / "whole", tensors, modules_to_save=["norm"])
    with pytest.raises(mk.UsageError, match="holds tensors whole") as caught:
        mk.TaskVector.from_adapter(folder).state_dict()
    assert "with_adapter" in caught.value.hint
    found = mk.load(made.path("base")).with_adapter(folder)
    assert torch.equal(found.tensor("model.norm.weight"), torch.ones(4))
