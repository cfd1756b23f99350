"""match_experts: the experts of a mixture in the order of those of another."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from merge_kit.api import merge
from merge_kit.core.tensors import ByteSpan
from merge_kit.engine import artefacts
from merge_kit.engine.kernel import Kernel
from merge_kit.engine.matching import best_order, match_experts
from merge_kit.engine.run import run_plan
from merge_kit.errors import InterruptedRun, MergeKitError, MismatchError, NonFiniteError, PlanError
from merge_kit.io.reader import Reader
from merge_kit.plan.building.matching_task import Compared, ExpertMatching, Slot
from merge_kit.plan.cost import once_bytes
from merge_kit.plan.describe import summary
from merge_kit.plan.residency import kept_bytes
from merge_kit.plan.sources import Chosen, Concat, LowRank, Memory, Stored, View
from tests.models import assert_same_tensors, averaged, stored
from tests.structures import mixtures
from tests.toys import plan

KINDS = ("mixtral", "qwen2_moe", "qwen3_moe")
ORDERS = ((2, 0, 1), (1, 0, 2))
"""Of the experts in the two layers: new place i holds what was expert ORDERS[layer][i]."""


def fine_tuned(kind: str, seed: int, noise: float = 0.02):
    """Return the mixture of seed 0 with noise, as training apart would leave it."""
    model, generator = mixtures.build(kind), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=noise)
    return model


def permuted(model, orders=ORDERS):
    """Give each layer's experts another order, their router rows with them."""
    with torch.no_grad():
        for layer, order in zip(model.model.layers, orders, strict=True):
            for weight in (*layer.mlp.experts.parameters(), layer.mlp.gate.weight):
                weight.copy_(weight[list(order)].clone())
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Save for each kind: two fine-tunes `a` and `b`, and `p`, which is `b` in another order."""
    folder = tmp_path_factory.mktemp("matched")
    for kind in KINDS:
        for dtype, end in ((torch.float32, ""), (torch.bfloat16, "-bf16")):
            mixtures.save(fine_tuned(kind, 1), folder / f"{kind}-a{end}", dtype)
            mixtures.save(fine_tuned(kind, 2), folder / f"{kind}-b{end}", dtype)
            mixtures.save(permuted(fine_tuned(kind, 2)), folder / f"{kind}-p{end}", dtype)
    for name in "abp":
        mixtures.fused(folder / f"qwen3_moe-{name}", folder / f"fused-{name}")
    return folder


def recipe(reference: Path | str, model: Path | str, **more) -> dict:
    return {
        "merge_method": "match_experts",
        "base_model": str(reference),
        "models": [{"model": str(model)}],
        **more,
    }


def refused(reference: Path, model: Path, **more) -> MergeKitError:
    with pytest.raises(MergeKitError) as caught:
        plan(json.dumps(recipe(reference, model, **more)), reference.parent)
    return caught.value


@pytest.mark.parametrize("by", ["weights", "router"])
@pytest.mark.parametrize("end", ["", "-bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_permuted_experts_come_back_to_their_places(kind, end, by, saved, tmp_path):
    named = recipe(saved / f"{kind}-a{end}", saved / f"{kind}-p{end}", parameters={"by": by})
    merge(named, tmp_path / "out", shard_size=9000)
    assert_same_tensors(stored(tmp_path / "out"), stored(saved / f"{kind}-b{end}"))
    own = (saved / f"{kind}-p{end}" / "config.json").read_text()
    assert (tmp_path / "out" / "config.json").read_text() == own


@pytest.mark.parametrize("by", ["weights", "router"])
def test_fused_experts_come_back_to_their_places(by, saved, tmp_path):
    named = recipe(saved / "fused-a", saved / "fused-p", parameters={"by": by})
    merge(named, tmp_path / "out")
    assert_same_tensors(stored(tmp_path / "out"), stored(saved / "fused-b"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_experts_changes_no_answer(kind, saved, tmp_path):
    merge(recipe(saved / f"{kind}-a", saved / f"{kind}-p"), tmp_path / "out")
    found, own = mixtures.load(tmp_path / "out"), mixtures.load(saved / f"{kind}-p")
    assert torch.allclose(mixtures.logits(found), mixtures.logits(own), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "fused"])
def test_matched_and_averaged_is_the_average_of_what_was_never_permuted(kind, saved, tmp_path):
    last = {
        "merge_method": "linear",
        "models": [
            {"model": str(saved / f"{kind}-a"), "parameters": {"weight": 0.5}},
            {"model": "matched", "parameters": {"weight": 0.5}},
        ],
    }
    first = {"name": "matched", **recipe(saved / f"{kind}-a", saved / f"{kind}-p")}
    text = tmp_path / "recipe.yaml"
    text.write_text(f"{json.dumps(first)}\n---\n{json.dumps(last)}")
    merge(text, tmp_path / "out")
    wanted = averaged([stored(saved / f"{kind}-{name}") for name in "ab"], [0.5, 0.5])
    assert_same_tensors(stored(tmp_path / "out"), wanted)
    if kind != "fused":
        plain = {**last, "models": [last["models"][0], {**last["models"][1]}]}
        plain["models"][1]["model"] = str(saved / f"{kind}-b")
        merge(plain, tmp_path / "plain")
        one, other = (mixtures.load(tmp_path / name) for name in ("out", "plain"))
        assert torch.equal(mixtures.logits(one), mixtures.logits(other))


def test_the_model_may_be_the_result_of_another_document(saved, tmp_path):
    half = {"name": "half", "merge_method": "passthrough"}
    half["models"] = [{"model": str(saved / "mixtral-p"), "parameters": {"scale": 0.5}}]
    text = tmp_path / "recipe.yaml"
    last = recipe(saved / "mixtral-a", "half")
    text.write_text(f"{json.dumps(half)}\n---\n{json.dumps(last)}")
    merge(text, tmp_path / "out")
    wanted = {name: tensor / 2 for name, tensor in stored(saved / "mixtral-b").items()}
    assert_same_tensors(stored(tmp_path / "out"), wanted)  # a factor on all changes no order


def test_a_stage_of_fused_experts_is_matched_too(saved, tmp_path):
    half = {"name": "half", "merge_method": "passthrough"}
    half["models"] = [{"model": str(saved / "fused-p"), "parameters": {"scale": 0.5}}]
    text = tmp_path / "recipe.yaml"
    text.write_text(f"{json.dumps(half)}\n---\n{json.dumps(recipe(saved / 'fused-a', 'half'))}")
    merge(text, tmp_path / "out")
    wanted = {name: tensor / 2 for name, tensor in stored(saved / "fused-b").items()}
    assert_same_tensors(stored(tmp_path / "out"), wanted)


def test_upcycled_experts_are_matched_by_how_they_differ(tmp_path):
    """Copies of one dense model with a little noise have all but a hundredth in common."""
    tensors, generator = {}, torch.Generator().manual_seed(3)
    common = torch.randn(6, 8, generator=generator)
    block = "model.layers.0.mlp"
    for e in range(5):
        noise = torch.randn(6, 8, generator=generator)
        tensors[f"{block}.experts.{e}.up_proj.weight"] = common + 0.01 * noise
    tensors[f"{block}.gate.weight"] = torch.randn(5, 8, generator=generator)
    mixtures.bare(tmp_path / "a", tensors)
    order, moved = [3, 1, 4, 0, 2], dict(tensors)
    for e, old in enumerate(order):
        name = f"{block}.experts.{e}.up_proj.weight"
        noise = torch.randn(6, 8, generator=generator)
        moved[name] = tensors[f"{block}.experts.{old}.up_proj.weight"] + 0.002 * noise
    moved[f"{block}.gate.weight"] = tensors[f"{block}.gate.weight"][order]
    mixtures.bare(tmp_path / "b", moved)
    merge(recipe(tmp_path / "a", tmp_path / "b"), tmp_path / "out")
    gate = stored(tmp_path / "out")[f"{block}.gate.weight"]
    assert torch.equal(gate, tensors[f"{block}.gate.weight"])


@settings(max_examples=15)
@given(st.lists(st.permutations(range(4)), min_size=3, max_size=3), st.integers(0, 2**16))
def test_every_layer_has_an_order_of_its_own(tmp_path_factory, orders, seed):
    folder = tmp_path_factory.mktemp("orders")
    rng = np.random.default_rng(seed)
    first, second = {}, {}
    for layer, order in enumerate(orders):
        block = f"model.layers.{layer}.mlp"
        sizes = 10.0 ** rng.uniform(-2, 2, size=4)  # experts of very different sizes
        up = (rng.standard_normal((4, 3, 5)) * sizes[:, None, None]).astype(np.float32)
        down = (rng.standard_normal((4, 5, 3)) * sizes[:, None, None]).astype(np.float32)
        noisy = up * (1 + 0.05 * rng.standard_normal(up.shape).astype(np.float32))
        bias = rng.standard_normal(4).astype(np.float32)
        for model, ups, places in ((first, up, range(4)), (second, noisy, order)):
            for new, old in enumerate(places):
                model[f"{block}.experts.{new}.up_proj.weight"] = torch.tensor(ups[old])
                model[f"{block}.experts.{new}.down_proj.weight"] = torch.tensor(down[old])
            model[f"{block}.gate.weight"] = torch.tensor(down[list(places), 0])
            model[f"{block}.gate.e_score_correction_bias"] = torch.tensor(bias[list(places)])
    mixtures.bare(folder / "a", first)
    mixtures.bare(folder / "b", second)
    merge(recipe(folder / "a", folder / "b"), folder / "out")
    found = stored(folder / "out")
    for name, tensor in first.items():
        if "up_proj" in name:
            assert torch.allclose(found[name], tensor, rtol=0.3, atol=0)
        else:
            assert torch.equal(found[name], tensor), name


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(0, 2**16))
def test_the_order_is_the_best_of_all(count, seed):
    gains = np.random.default_rng(seed).standard_normal((count, count))
    found = best_order(torch.tensor(gains))
    best = max(
        sum(gains[i, column] for i, column in enumerate(order))
        for order in itertools.permutations(range(count))
    )
    assert sorted(found) == list(range(count))
    assert sum(gains[i, column] for i, column in enumerate(found)) == pytest.approx(best)


def test_copies_stay_where_they_are():
    assert best_order(torch.zeros(6, 6)) == [0, 1, 2, 3, 4, 5]
    two_alike = torch.tensor([[0.0, 5.0, 5.0], [5.0, 0.0, 0.0], [5.0, 0.0, 0.0]])
    assert best_order(two_alike) == [1, 0, 2]


def in_memory(rows: np.ndarray) -> tuple[Slot, ...]:
    """Return experts in memory, one after the other in one tensor."""
    flat = torch.tensor(rows, dtype=torch.float32).flatten()
    source = Memory(flat, "F32", tuple(flat.shape))
    return tuple(Slot(source, i * rows.shape[1]) for i in range(len(rows)))


def find(*parts: Compared, stop: threading.Event | None = None):
    task = ExpertMatching("model.layers.0.mlp.experts", len(parts[0].model), parts)
    with Reader([]) as reader:
        return match_experts(task, Kernel(reader).operands, stop or threading.Event())


def test_experts_are_compared_over_all_their_tensors_run_by_run():
    rng, size = np.random.default_rng(1), 700_001  # more than is held at once
    up, down = rng.standard_normal((3, size)), rng.standard_normal((3, 7))
    order = [1, 2, 0]
    parts = [Compared(x.shape[1], in_memory(x), in_memory(x[order] * 1.01)) for x in (up, down)]
    found = find(*parts)
    assert found["order"].tolist() == [2, 0, 1]
    whole = np.concatenate([up, down], axis=1).astype(np.float32).astype(np.float64)
    other = np.concatenate([up * 1.01, down * 1.01], axis=1).astype(np.float32).astype(np.float64)
    wanted = np.linalg.norm(whole - other, axis=1) / np.linalg.norm(whole, axis=1)
    assert found["distance"].numpy() == pytest.approx(wanted, rel=1e-9)


def test_the_size_of_experts_tells_those_of_one_direction_apart():
    rows = np.outer([1.0, 2.0, 4.0], np.arange(1.0, 9.0))  # cosines would all be 1
    found = find(Compared(8, in_memory(rows), in_memory(rows[[2, 0, 1]])))
    assert found["order"].tolist() == [1, 2, 0]


def test_values_that_are_not_finite_are_named():
    rows = np.ones((2, 4))
    rows[1, 2] = np.nan
    with pytest.raises(NonFiniteError, match="hold NaN or infinity") as caught:
        find(Compared(4, in_memory(np.ones((2, 4))), in_memory(rows)))
    assert caught.value.where == "model.layers.0.mlp.experts"


def test_a_signal_ends_the_comparing():
    stop = threading.Event()
    stop.set()
    with pytest.raises(InterruptedRun):
        find(Compared(4, in_memory(np.ones((2, 4))), in_memory(np.ones((2, 4)))), stop=stop)


def test_the_bill_reads_experts_once_to_compare_and_once_to_write(saved):
    made = plan(json.dumps(recipe("mixtral-a", "mixtral-p")), saved)
    whole = sum(tensor.nbytes for tensor in stored(saved / "mixtral-a").values())
    experts = sum(
        tensor.nbytes for name, tensor in stored(saved / "mixtral-a").items() if "experts" in name
    )
    assert made.bill.read_bytes == whole + 2 * experts
    assert sum(one.read_bytes for one in made.artefacts) == 2 * experts
    fused = plan(json.dumps(recipe("fused-a", "fused-p")), saved)
    assert fused.bill.read_bytes == whole_bytes(saved / "fused-a") + 2 * experts_bytes(saved)


def whole_bytes(folder: Path) -> int:
    return sum(tensor.nbytes for tensor in stored(folder).values())


def experts_bytes(folder: Path) -> int:
    tensors = stored(folder / "fused-a")
    return sum(tensor.nbytes for name, tensor in tensors.items() if "experts" in name)


def test_one_of_the_sources_that_are_chosen_from_is_billed():
    span = ByteSpan(Path("x"), 0, 400)
    stored_one = Stored(span, "F32", (10, 10))
    views = tuple(View(stored_one, 10 * i, (1, 10)) for i in range(10))
    rows = Concat(tuple(Chosen(views, "k", "order", i, plain=True) for i in range(10)))
    assert once_bytes(Chosen((stored_one,) * 3, "k", "order", 0)) == 400
    assert once_bytes(rows) == 400
    factor = Stored(ByteSpan(Path("x"), 0, 40), "F32", (1, 10))
    tall = Stored(ByteSpan(Path("x"), 0, 40), "F32", (10, 1))
    change = LowRank(stored_one, factor, tall, 1.0, (10, 10))
    assert kept_bytes(Chosen((change,) * 3, "k", "order", 0), 4) == kept_bytes(change, 4)


def test_all_tensors_are_accounted_for(saved):
    made = plan(json.dumps(recipe("mixtral-a", "mixtral-p")), saved)
    fates = {(fate.model, fate.tensor): fate for fate in made.fates}
    expert = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    assert fates["input-2", expert].why == "only compared with"
    assert fates["input-1", expert].what == "merged"
    assert fates["input-2", "model.norm.weight"].why == "base_model lends an order"
    assert fates["input-1", "model.norm.weight"].what == "copied"
    assert any("the 3 experts of each of 2 layers are put in the order" in n for n in made.notes)


@pytest.mark.parametrize(
    ("reference", "model", "problem"),
    [
        ("qwen3_moe-a", "mixtral-a", "has experts in model.layers.0.block_sparse_moe.experts"),
        ("qwen3_moe-a", "fused-p", "stores its experts fused, .*qwen3_moe-a split"),
        ("qwen3_moe-a", "four", "has 4 experts, input-2:qwen3_moe-a has 3"),
        ("qwen3_moe-a", "wide", "down_proj.weight has shape \\[16, 30\\], in .* \\[16, 24\\]"),
        ("qwen3_moe-a", "deep", "has experts in model.layers.2.mlp.experts, .* has none there"),
    ],
)
def test_mixtures_that_do_not_fit_are_refused(reference, model, problem, saved):
    changed = {
        "four": {"num_experts": 4},
        "wide": {"moe_intermediate_size": 30},
        "deep": {"num_hidden_layers": 3},
    }
    if model in changed:
        mixtures.save(mixtures.build("qwen3_moe", **changed[model]), saved / model)
    error = refused(saved / reference, saved / model)
    assert isinstance(error, MismatchError)
    with pytest.raises(MismatchError, match=problem):
        raise error


def test_experts_without_their_router_are_refused(tmp_path):
    lead = "model.layers.0.mlp.experts"
    tensors = mixtures.split_experts(1, 2, ("up_proj",), (4, 4), lead)
    for name in "ab":
        mixtures.bare(tmp_path / name, tensors)
    error = refused(tmp_path / "a", tmp_path / "b")
    assert "the router was not found" in str(error)


def test_experts_that_are_not_float_are_refused(tmp_path):
    lead = "model.layers.0.mlp"
    tensors = {
        f"{lead}.experts.{e}.up_proj.weight": torch.ones(4, 4, dtype=torch.int8) for e in range(2)
    }
    tensors[f"{lead}.gate.weight"] = torch.ones(2, 4)
    mixtures.bare(tmp_path / "a", tensors)
    mixtures.bare(tmp_path / "b", {name: tensor.float() for name, tensor in tensors.items()})
    for reference, model in ("ab", "ba"):
        error = refused(tmp_path / reference, tmp_path / model)
        assert "a, model.layers.0.mlp.experts" in error.where
        assert "of dtype I8 cannot be matched" in error.problem


def test_experts_of_two_dtypes_cannot_change_places(tmp_path):
    lead = "model.layers.0.mlp"
    tensors = {
        f"{lead}.experts.{e}.up_proj.weight": torch.ones(2, 2, dtype=dtype)
        for e, dtype in enumerate((torch.float32, torch.bfloat16))
    }
    tensors[f"{lead}.gate.weight"] = torch.ones(2, 2)
    mixtures.bare(tmp_path / "mixed", tensors)
    mixtures.bare(tmp_path / "same", {name: tensor.float() for name, tensor in tensors.items()})
    error = refused(tmp_path / "same", tmp_path / "mixed")
    assert "of dtypes BF16 and F32 cannot be matched" in error.problem
    merge(recipe(tmp_path / "mixed", tmp_path / "same"), tmp_path / "out")  # only compared with


@pytest.mark.parametrize("shape", [(), (0, 3), (1,)])
def test_experts_of_any_shape_are_matched(shape, tmp_path):
    lead, values = "model.layers.0.mlp", (3.0, 5.0)
    for folder, order in (("a", (0, 1)), ("b", (1, 0))):
        tensors = {
            f"{lead}.experts.{e}.up_proj": torch.full(shape, values[old])
            for e, old in enumerate(order)
        }
        gate = torch.tensor([[values[old]] for old in order])
        mixtures.bare(tmp_path / folder, {**tensors, f"{lead}.gate.weight": gate})
    for by in ("weights", "router") if 0 not in shape else ("router",):
        merge(recipe(tmp_path / "a", tmp_path / "b", parameters={"by": by}), tmp_path / by)
        assert_same_tensors(stored(tmp_path / by), stored(tmp_path / "a"))


def test_a_reference_and_one_model_are_taken(saved):
    both = [{"model": str(saved / "mixtral-a")}, {"model": str(saved / "mixtral-b")}]
    error = refused(saved / "mixtral-p", saved / "mixtral-a", models=both)
    assert isinstance(error, PlanError)
    assert "found 2 models" in str(error)
    with pytest.raises(MergeKitError, match="base_model"):
        plan(json.dumps({"merge_method": "match_experts", "models": both[:1]}), saved)


def test_the_recipe_of_the_repository_finds_who_is_who(tmp_path):
    folder = Path(__file__).parents[2] / "recipes"
    merge(folder / "match_experts.yaml", tmp_path / "out")
    found = stored(tmp_path / "out")
    for e, name in enumerate(("add", "sort", "translate")):
        own = stored(folder / "demo" / name)
        for layer in range(4):
            block = f"model.layers.{layer}"
            expert = found[f"{block}.block_sparse_moe.experts.{e}.w1.weight"].float()
            gap = expert - own[f"{block}.mlp.gate_proj.weight"].float()
            assert float(gap.square().mean().sqrt()) < 0.001  # half the noise, and rounding


def test_a_run_that_goes_on_keeps_the_orders_it_found(saved, tmp_path, monkeypatch):
    made = plan(json.dumps(recipe("mixtral-a", "mixtral-p")), saved, threads=1)
    whole, stop, folder = tmp_path / "whole", threading.Event(), tmp_path / "out"
    whole.mkdir()
    folder.mkdir()
    wanted = run_plan(made, whole)
    found = 0

    def after_one(task, operands, event):
        nonlocal found
        if found == 1:
            event.set()
        found += 1
        return match_experts(task, operands, event)

    monkeypatch.setitem(artefacts.FINDERS, ExpertMatching, after_one)
    with pytest.raises(InterruptedRun):
        run_plan(made, folder, stop=stop)
    monkeypatch.setitem(artefacts.FINDERS, ExpertMatching, match_experts)
    orders = {one.name: one.read_bytes() for one in folder.rglob("found-*.safetensors")}
    assert len(orders) == 1  # of the first of two layers
    report = run_plan(made, folder)
    assert report.hashes == wanted.hashes
    assert report.orders == wanted.orders
    kept = {one.name: one.read_bytes() for one in folder.rglob("found-*.safetensors")}
    assert len(kept) == 2
    assert orders.items() <= kept.items()


def test_the_report_says_what_was_matched(saved, tmp_path):
    done = merge(recipe(saved / "mixtral-a", saved / "mixtral-p"), tmp_path / "out")
    places = {}
    for layer, order in enumerate(ORDERS):
        where = f"input-1:mixtral-p, model.layers.{layer}.block_sparse_moe.experts"
        places[where] = [order.index(i) for i in range(3)]
    found = done.report.orders
    assert {where: [e for e, _ in pairs] for where, pairs in found.items()} == places
    distances = [distance for pairs in found.values() for _, distance in pairs]
    assert all(0.05 < distance < 0.2 for distance in distances)  # sqrt(2) * 0.02 of 0.3


def test_the_plan_shows_one_line_for_all_layers(saved):
    made = plan(json.dumps(recipe("mixtral-a", "mixtral-p")), saved)
    (shown,) = [row.text for row in summary(made, None) if row.label == "found first"]
    assert shown.startswith("experts-0-0 to experts-0-1 (")


def test_an_adapter_on_the_model_is_matched_with_it(saved, tmp_path):
    """Half of one expert's projection comes from a LoRA: experts are compared as they are used."""
    model, name = saved / "qwen3_moe-p", "model.layers.0.mlp.experts.1.up_proj"
    generator = torch.Generator().manual_seed(9)
    rows = {"A": (2, 16), "B": (24, 2)}
    factors = {
        f"base_model.model.{name}.lora_{side}.weight": torch.randn(shape, generator=generator)
        for side, shape in rows.items()
    }
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    merge(recipe(saved / "qwen3_moe-a", f"{model}+{tmp_path / 'adapter'}"), tmp_path / "out")
    own, found = stored(model), stored(tmp_path / "out")
    a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    wanted = own[f"{name}.weight"] + b @ a
    place = f"model.layers.0.mlp.experts.{ORDERS[0][1]}.up_proj.weight"
    assert torch.allclose(found[place], wanted, rtol=0, atol=1e-5)
    rest = stored(saved / "qwen3_moe-b")
    assert all(torch.equal(found[n], rest[n]) for n in rest if n != place)


OTHERS = {
    "gpt_oss": transformers.GptOssConfig(
        **mixtures.SMALL,
        num_local_experts=3,
        num_experts_per_tok=2,
        intermediate_size=24,
        head_dim=8,
        sliding_window=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "deepseek_v3": transformers.DeepseekV3Config(
        **{**mixtures.SMALL, "num_key_value_heads": 4},
        n_routed_experts=3,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        intermediate_size=24,
        moe_intermediate_size=12,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
    ),
    "olmoe": transformers.OlmoeConfig(
        **mixtures.SMALL, num_experts=3, num_experts_per_tok=2, intermediate_size=24
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_experts_of_any_class_are_matched(kind, tmp_path):
    model = transformers.AutoModelForCausalLM.from_config(OTHERS[kind]).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "inv_freq" not in name:
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    model.save_pretrained(tmp_path / "a")
    before, moved = mixtures.logits(model), 0
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            inside = ".mlp." in name and "shared" not in name
            if inside and tensor.shape[:1] == (3,):
                tensor.copy_(tensor[[2, 0, 1]].clone())
                moved += 1
    assert moved > 2
    model.save_pretrained(tmp_path / "p")
    assert torch.allclose(mixtures.logits(model), before, rtol=0, atol=1e-4)
    merge(recipe(tmp_path / "a", tmp_path / "p"), tmp_path / "out")
    assert_same_tensors(stored(tmp_path / "out"), stored(tmp_path / "a"))
