"""Adapters in the library against dense matrices in float64, and against recipes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merge_kit as mk
from tests.api.conftest import assert_same
from tests.toys import write

SHAPES = {
    "model.embed_tokens.weight": (9, 4),  # (tokens, width)
    "model.layers.0.self_attn.q_proj.weight": (6, 4),
    "model.layers.0.mlp.up_proj.weight": (8, 4),
    "model.layers.1.self_attn.q_proj.weight": (6, 4),
    "model.layers.1.mlp.up_proj.weight": (8, 4),
    "model.norm.weight": (4,),
    "lm_head.weight": (9, 4),
}
Q = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
UP = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
EMBED = "model.embed_tokens"
SETTINGS = {
    "peft_type": "LORA",
    "base_model_name_or_path": "org/base",
    "r": 2,
    "lora_alpha": 3,
    "fan_in_fan_out": False,
}
SCALE = 1.5
FLOAT32 = 2.0**-22  # of the sum of magnitudes


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(seed: int, dtype=torch.float32) -> dict[str, Tensor]:
    """Return a model's tensors; those of integers are the same for every seed."""
    found = {n: draw(seed + i, *s).to(dtype) for i, (n, s) in enumerate(SHAPES.items())}
    return {**found, "model.ids": torch.arange(4)}


def factors(seed: int, modules: tuple[str, ...]) -> dict[str, Tensor]:
    """Return peft's tensors of an adapter of rank 2."""
    found = {}
    for i, module in enumerate(modules):
        outputs, inputs = SHAPES[f"{module}.weight"]
        at = seed + 2 * i
        if module == EMBED:  # the rows of the weight are the inputs
            names, outputs, inputs = ("lora_embedding_A", "lora_embedding_B"), inputs, outputs
        else:
            names = ("lora_A.weight", "lora_B.weight")
        found[f"base_model.model.{module}.{names[0]}"] = draw(at, 2, inputs)
        found[f"base_model.model.{module}.{names[1]}"] = draw(at + 1, outputs, 2)
    return found


def deltas(tensors: dict[str, Tensor], scale: float = SCALE) -> dict[str, Tensor]:
    """Return what an adapter changes, by weight, dense in float64."""
    found = {}
    for name, a in tensors.items():
        module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        if "lora_embedding_A" in name:
            b = tensors[name.replace("lora_embedding_A", "lora_embedding_B")]
            found[f"{module}.weight"] = scale * (b.double() @ a.double()).T
        elif "lora_A" in name:
            b = tensors[name.replace("lora_A", "lora_B")]
            found[f"{module}.weight"] = scale * b.double() @ a.double()
    return found


def write_adapter(folder: Path, tensors: dict[str, Tensor], **more: object) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({n.split(".lora_")[0].rpartition(".")[2] for n in tensors if ".lora_" in n})
    settings = {**SETTINGS, "target_modules": targets, **more}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@dataclass(frozen=True, slots=True)
class Made:
    """A base, a fine-tune, and two adapters: sort of q_proj and the embedding, add of all linear.

    Attributes:
        sort: What the adapter of this name changes, dense.
    """

    folder: Path
    base: dict[str, Tensor]
    code: dict[str, Tensor]
    sort: dict[str, Tensor]
    add: dict[str, Tensor]

    def path(self, name: str) -> Path:
        return self.folder / name

    def on_base(self, name: str) -> str:
        return f"{self.folder / 'base'}+{self.folder / name}"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("adapters")
    sort, add = factors(100, (*Q, EMBED)), factors(200, (*Q, *UP))
    found = Made(folder, model(0), model(50), deltas(sort), deltas(add))
    for name in ("base", "code"):
        write(folder / name, getattr(found, name), {"model_type": "toy"})
    write_adapter(folder / "sort", sort)
    write_adapter(folder / "add", add)
    return found


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], *parts: dict) -> None:
    """Check float32 tensors against float64 ones, within what a sum of `parts` may be off."""
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            assert torch.equal(tensor, wanted[name]), name
            continue
        size = sum(part[name].double().abs() for part in parts if name in part)
        assert torch.all((tensor.double() - wanted[name]).abs() <= FLOAT32 * size + 1e-12), name


def added(base: dict[str, Tensor], *changes: tuple[float, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return a model plus weighted changes, in float64."""
    found = {n: t.double() if t.is_floating_point() else t for n, t in base.items()}
    for weight, change in changes:
        found |= {name: found[name] + weight * delta for name, delta in change.items()}
    return found


def weights(folder: Path) -> dict[str, bytes]:
    """Return the bytes of the weight files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def size(changes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the largest that a product of factors of this size may be, element by element."""
    return {name: delta.abs() + delta.abs().max() for name, delta in changes.items()}


# Models with adapters on top


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


# Task vectors


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


# What is refused


def test_an_adapter_without_a_base_is_refused_with_the_way_to_write_it(made):
    for call in (
        lambda: mk.linear([made.path("sort"), made.path("code")]),
        lambda: mk.ties(made.path("sort"), [made.path("code")]),
        lambda: mk.TaskVector(made.path("code"), made.path("sort")),
        lambda: mk.load(made.path("code")) - mk.load(made.path("sort")),
        lambda: mk.greedy_soup([made.path("sort")], lambda _: 1.0),
    ):
        with pytest.raises(mk.UsageError, match="is an adapter, expected a model") as caught:
            call()
        assert "BASE+ADAPTER" in caught.value.hint


def test_sums_of_a_loaded_adapter_are_refused(made):
    merge = mk.load(made.path("code")) + mk.load(made.path("sort"))
    with pytest.raises(mk.MergeKitError, match="is an adapter"):
        merge.state_dict()


@pytest.mark.parametrize(
    ("adapter", "weight", "problem"),
    [
        (3, 1.0, "type int, expected an adapter"),
        ("sort", float("nan"), "the weight is nan, expected a finite number"),
        ("sort", True, "the weight is True, expected a finite number"),
        ("sort", "1", "the weight is '1', expected a finite number"),
    ],
)
def test_what_is_no_adapter_is_refused(made, adapter, weight, problem):
    named = made.path(adapter) if isinstance(adapter, str) else adapter
    with pytest.raises(mk.UsageError, match=problem):
        mk.load(made.path("base")).with_adapter(named, weight)
    with pytest.raises(mk.UsageError, match="is no adapter"):
        mk.load(made.path("base")).with_adapter(mk.load(made.path("code")))
    with pytest.raises(mk.CheckpointError):
        mk.load(made.path("base")).with_adapter(made.path("code"))


def test_a_folder_of_a_model_and_an_adapter_is_either(made, tmp_path):
    write_adapter(tmp_path / "both", factors(100, (*Q, EMBED)))
    save_file(made.base, tmp_path / "both" / "model.safetensors")
    assert_same(mk.load(tmp_path / "both").state_dict(), made.base)
    found = mk.load(f"{tmp_path / 'both'}+{tmp_path / 'both'}")
    assert_same(found.state_dict(), mk.load(made.on_base("sort")).state_dict())


def test_an_adapter_on_an_adapter_is_refused(made):
    with pytest.raises(mk.UsageError, match="is an adapter, expected a model below"):
        mk.load(made.path("sort")).with_adapter(made.path("add"))
    with pytest.raises(mk.UsageError, match="is an adapter, expected a model below"):
        mk.load(f"{made.path('sort')}+{made.path('add')}")


def test_parts_that_are_not_there_are_named(made):
    with pytest.raises(mk.CheckpointError, match="no such folder or file"):
        mk.load(f"{made.path('base')}+{made.path('nothing')}")
    with pytest.raises(mk.UsageError, match="is no reference"):
        mk.load(f"{made.path('base')}+")
    with pytest.raises(mk.CheckpointError, match="no such folder or file"):
        mk.load(f"{made.path('base')}@v1+{made.path('sort')}")
    with pytest.raises(mk.MergeKitError):
        mk.load("base+\0")
    with pytest.raises(mk.MergeKitError):
        mk.load("+".join(["a"] * 5000))


def test_an_adapter_that_does_not_fit_is_refused_when_it_is_put_on_top(made, tmp_path):
    wide = {n: torch.cat([t, t], 1) if "lora_A" in n else t for n, t in factors(1, Q).items()}
    folder = write_adapter(tmp_path / "wide", wide)
    with pytest.raises(mk.MismatchError, match=r"q_proj"):
        mk.load(made.path("base")).with_adapter(folder)


def test_an_adapter_of_several_possible_bases_is_refused(made):
    task = mk.TaskVector.from_adapter(made.path("sort"))
    merge = (mk.load(made.path("base")) + mk.load(made.path("code"))) / 2 + task
    with pytest.raises(mk.UsageError, match=r"found 2 models that .* could be an adapter of"):
        merge.state_dict()
    merge = mk.linear([made.path("base"), made.path("code")]) + task
    with pytest.raises(mk.UsageError, match="has no tensors yet"):
        merge.state_dict()


def test_no_output_replaces_an_adapter_that_is_read(made):
    merge = mk.linear([mk.load(made.base).with_adapter(made.path("sort"))])
    with pytest.raises(mk.OutputExistsError):
        merge.save(made.path("sort"), overwrite=True)
    assert (made.path("sort") / "adapter_config.json").exists()


# Adapters out


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
