"""Models with adapters on top, against dense matrices in float64 and against recipes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import merge_kit as mk
from tests.api.conftest import assert_same
from tests.api.low_rank import (
    EMBED,
    SCALE,
    SHAPES,
    UP,
    Q,
    added,
    assert_near,
    deltas,
    factors,
    model,
    size,
    weights,
)
from tests.toys import write


def test_a_model_with_an_adapter_has_the_weights_of_both(made):
    found = mk.load(made.path("base")).with_adapter(made.path("sort"))
    wanted = added(made.base, (1.0, made.sort))
    assert_near(found.state_dict(), wanted, made.base, size(made.sort))
    assert_same({n: found.tensor(n) for n in found}, found.state_dict())
    assert found.names == mk.load(made.path("base")).names
    assert found.shape(f"{EMBED}.weight") == (9, 4)
    assert found.dtype(f"{EMBED}.weight") == "F32"


def test_what_the_adapter_leaves_alone_keeps_its_bits(made):
    found = mk.load(made.path("base")).with_adapter(made.path("sort")).state_dict()
    rest = set(made.base) - set(made.sort)
    assert len(rest) == 5
    assert_same({n: found[n] for n in rest}, {n: made.base[n] for n in rest})


def test_a_plus_between_paths_means_an_adapter_on_top(made, monkeypatch):
    by_text = mk.load(made.on_base("sort"))
    by_method = mk.load(made.path("base")).with_adapter(made.path("sort"))
    assert_same(by_text.state_dict(), by_method.state_dict())
    monkeypatch.chdir(made.folder)
    both = mk.load("base+sort+add")
    wanted = added(made.base, (1.0, made.sort), (1.0, made.add))
    assert_near(both.state_dict(), wanted, made.base, size(made.sort), size(made.add))
    assert "base + " in str(both)


def test_a_path_wins_over_a_plus(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "base+sort", made.code, {"model_type": "toy"})
    assert_same(mk.load("base+sort").state_dict(), made.code)


def test_weights_scale_and_the_order_does_not_matter(made):
    base = mk.load(made.path("base"))
    found = base.with_adapter(made.path("sort"), 0.5).with_adapter(made.path("add"), weight=-2.0)
    wanted = added(made.base, (0.5, made.sort), (-2.0, made.add))
    parts = made.base, size(made.sort), size(deltas(factors(200, (*Q, *UP)), 2 * SCALE))
    assert_near(found.state_dict(), wanted, *parts)
    turned = base.with_adapter(made.path("add"), weight=-2.0).with_adapter(made.path("sort"), 0.5)
    assert_near(turned.state_dict(), wanted, *parts)


def test_an_adapter_that_is_taken_off_again_leaves_the_bits_of_the_base(made):
    base, sort = mk.load(made.path("base")), made.path("sort")
    assert_same(base.with_adapter(sort).with_adapter(sort, -1.0).state_dict(), made.base)
    twice = base.with_adapter(sort).with_adapter(sort)
    assert_same(twice.state_dict(), base.with_adapter(sort, 2.0).state_dict())


def test_the_result_is_rounded_once_to_the_dtype_of_the_base(made):
    narrow, wide = model(7, torch.bfloat16), model(7, torch.float64)
    found = mk.load(narrow).with_adapter(made.path("sort")).state_dict()
    wanted = added(narrow, (1.0, made.sort))
    for name in made.sort:  # no sum is near the middle of two numbers of 16 bits
        assert torch.equal(found[name], wanted[name].to(torch.bfloat16)), name
    found = mk.load(wide).with_adapter(made.path("sort")).state_dict()
    wanted = added(wide, (1.0, made.sort))
    for name in made.sort:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-14, atol=1e-14)


def test_a_base_in_memory_gives_the_bits_of_one_on_disk(made, tmp_path):
    in_memory = mk.load(made.base).with_adapter(made.path("sort"), 0.5)
    on_disk = mk.load(made.path("base")).with_adapter(made.path("sort"), 0.5)
    assert_same(in_memory.state_dict(), on_disk.state_dict())
    merged = mk.linear([in_memory, made.code], weight=[0.3, 0.7])
    again = mk.linear([on_disk, made.path("code")], weight=[0.3, 0.7])
    assert_same(merged.state_dict(), again.state_dict())
    merged.save(tmp_path / "memory")
    again.save(tmp_path / "disk")
    assert weights(tmp_path / "memory") == weights(tmp_path / "disk")


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {"weight": [0.3, 0.7]}),
        ("slerp", {"t": 0.25}),
        ("ties", {"density": 0.5}),
        ("dare_linear", {"density": 0.5, "seed": 3}),
        ("task_arithmetic", {"weight": [0.5, -1.0]}),
        ("karcher", {}),
        ("model_stock", {}),
    ],
)
def test_methods_give_the_bytes_of_their_recipe(made, tmp_path, method, parameters):
    with_base = method not in {"linear", "karcher"}
    models = [made.on_base("sort"), made.on_base("add")]
    models = models[:1] if method == "slerp" else models
    function = getattr(mk, method)
    merge = function(*([made.path("base")] if with_base else []), models, **parameters)
    merge.save(tmp_path / "library")
    told = dict(parameters)
    own = told.pop("weight", None)
    recipe = {
        "merge_method": method,
        "seed": told.pop("seed", 0),
        "models": [
            {"model": m, "parameters": {"weight": own[i]} if own else {}}
            for i, m in enumerate(models)
        ],
        "parameters": {**({"weight": 1.0} if own is None else {}), **told},
    }
    if method in {"slerp", "karcher", "model_stock"}:
        recipe["parameters"].pop("weight")
    if with_base:
        recipe["base_model"] = str(made.path("base"))
    mk.merge(recipe, tmp_path / "recipe")
    assert weights(tmp_path / "library") == weights(tmp_path / "recipe")
    assert_same(merge.state_dict(), load_file(tmp_path / "library" / "model.safetensors"))


def test_a_weight_of_an_adapter_stands_in_the_recipe(made, tmp_path):
    half = mk.load(made.path("base")).with_adapter(made.path("sort"), weight=0.5)
    mk.passthrough([half]).save(tmp_path / "library")
    reference = {
        "model": str(made.path("base")),
        "lora": [{"path": str(made.path("sort")), "weight": 0.5}],
    }
    mk.merge({"merge_method": "passthrough", "models": [{"model": reference}]}, tmp_path / "recipe")
    assert weights(tmp_path / "library") == weights(tmp_path / "recipe")
    assert_same(half.state_dict(), load_file(tmp_path / "library" / "model.safetensors"))


def test_an_adapter_alone_is_on_top_of_the_base_of_a_method(made):
    alone = mk.ties(made.path("base"), [made.path("sort"), made.path("code")], density=0.5)
    named = mk.ties(made.path("base"), [made.on_base("sort"), made.path("code")], density=0.5)
    assert_same(alone.state_dict(), named.state_dict())
    in_memory = mk.ties(made.base, [made.path("sort"), made.code], density=0.5)
    assert_same(in_memory.state_dict(), named.state_dict())


def test_a_base_that_is_loaded_twice_is_one(made):
    # Weights of 1e4 would hide most of the adapter if the base were subtracted in float32.
    base = {n: t * 1e4 if t.is_floating_point() else t for n, t in made.base.items()}
    with_adapter = mk.load(base).with_adapter(made.path("sort"))
    found = mk.task_arithmetic(mk.load(base), [with_adapter], weight=1e4).state_dict()
    wanted = added(base, (1e4, made.sort))
    assert_near(found, wanted, base, {n: 1e4 * d for n, d in size(made.sort).items()})


def test_results_of_models_with_adapters_are_models(made):
    inner = mk.ties(made.path("base"), [made.on_base("sort"), made.path("code")], density=0.5)
    outer = mk.linear([inner, made.on_base("add")], weight=[0.5, 0.5]).state_dict()
    first = inner.state_dict(dtype="float32")
    second = mk.load(made.on_base("add")).state_dict()
    for name in SHAPES:
        torch.testing.assert_close(outer[name], (first[name] + second[name]) / 2)


def test_a_soup_may_hold_adapters(made):
    soup = mk.greedy_soup(
        [made.path("sort"), made.path("code")], lambda _: 1.0, base=made.path("base")
    )
    assert soup.chosen == (0,)
    assert_near(
        soup.merge.state_dict(),
        added(made.base, (1.0, made.sort)),
        made.base,
        size(made.sort),
    )


def test_an_adapter_that_is_loaded_holds_its_factors(made):
    adapter = mk.load(made.path("sort"))
    assert_same(adapter.state_dict(), factors(100, (*Q, EMBED)))
    base = mk.load(made.path("base"))
    assert_same(
        base.with_adapter(adapter).state_dict(), base.with_adapter(made.path("sort")).state_dict()
    )
