"""Adapters on a base, against peft's forward pass in float64."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from merge_kit import MergeKitError, merge
from tests.adapters.makers import (
    KINDS,
    VOCAB,
    answers,
    load_adapted,
    load_base,
    make,
    make_adapter,
    make_base,
    quiet,
    scale,
    tensors,
)
from tests.oracles import adapters as oracle

CLOSE = 1e-9
"""An input is F64, so everything is computed in float64; the answers are of the size of 10."""

UNTIED = frozenset({"tied_head", "tied_embedding"})
"""Kinds that change one of two tied matrices alone: the merge has one tensor more than the base."""


def on(base, *adapters, weights=()):
    """Return a reference to a base with adapters, each with a weight if there are any."""
    if not weights:
        return "+".join(map(str, (base, *adapters)))
    pairs = zip(adapters, weights, strict=True)
    return {"model": str(base), "lora": [{"path": str(a), "weight": w} for a, w in pairs]}


def merged_into(base, *adapters, out, weights=(), **more):
    """Merge adapters into a base and return what the run returned."""
    models = [{"model": on(base, *adapters, weights=weights)}]
    return merge({"merge_method": "passthrough", "models": models, **more}, out)


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = CLOSE) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= tolerance


def within(found: Tensor, wanted: Tensor, mass: Tensor, factor: float = 4.0) -> bool:
    """Return whether a tensor is float32 arithmetic, rounded once to its dtype.

    The measure is 2^-22 of the sum of the magnitudes of all terms, times a factor: products are
    summed in an order of their own.
    """
    slack = factor * 2.0**-22 * mass
    low, high = (wanted - slack).to(found.dtype), (wanted + slack).to(found.dtype)
    return bool(((low <= found) & (found <= high)).all())


# one adapter of every kind -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_into_the_base_answers_as_peft_does(tmp_path, kind):
    base, adapter = make(kind, tmp_path)
    merged_into(base, adapter, out=tmp_path / "out")
    name = KINDS[kind].base
    wanted = answers(load_adapted(name, base, adapter))
    assert float((wanted - answers(load_base(name, base))).abs().max()) > 0.01
    assert_close(answers(load_base(name, tmp_path / "out")), wanted)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in UNTIED])
def test_only_what_the_adapter_names_changes_and_nothing_of_it_is_ignored(tmp_path, kind):
    base, adapter = make(kind, tmp_path)
    done = merged_into(base, adapter, out=tmp_path / "out")
    before, after = tensors(base), tensors(tmp_path / "out")
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    touched = KINDS[kind].touched
    assert [part for part in touched if not any(part in name for name in changed)] == []
    assert [name for name in changed if not any(part in name for part in touched)] == []
    names = {model.key: model.name for model in done.plan.inputs}
    fates = {}
    for fate in done.plan.fates:
        fates.setdefault(names[fate.model], {})[fate.tensor] = fate.what
    assert set(fates) == {"base", "adapter"}
    assert fates["base"].keys() == before.keys()
    assert fates["adapter"].keys() == tensors(adapter).keys()
    merged, copied, dropped = done.plan.counts()
    assert (merged + copied, dropped) == (len(before), list_dropped(fates))


def list_dropped(fates):
    return sum(what == "dropped" for of_one in fates.values() for what in of_one.values())


def test_the_oracle_means_what_peft_means(tmp_path):
    for kind in ("rslora", "both_patterns", "fan_in_fan_out", "embedding", "net", "lora_bias"):
        base, adapter = make(kind, tmp_path / kind)
        model = load_base(KINDS[kind].base, base)
        for name, change in oracle.changes(adapter).items():
            with torch.no_grad():
                model.get_parameter(name).add_(change)
        assert_close(answers(model), answers(load_adapted(KINDS[kind].base, base, adapter)))


def test_the_embedding_that_peft_saves_below_an_update_takes_the_place_of_the_bases(tmp_path):
    base, adapter = make("embedding", tmp_path)
    file = adapter / "adapter_model.safetensors"
    held = tensors(adapter)
    held["base_model.model.model.embed_tokens.base_layer.weight"] *= 1.5
    save_file(held, file)
    merged_into(base, adapter, out=tmp_path / "out")
    wanted = answers(load_adapted("llama", base, adapter))
    assert_close(answers(load_base("llama", tmp_path / "out")), wanted)


# dtypes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_adapter", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_base", [torch.bfloat16, torch.float16, torch.float32])
def test_the_sum_is_rounded_once_to_the_dtype_of_the_base(tmp_path, of_base, of_adapter):
    config = KINDS["both_patterns"].config
    base = make_base("llama", tmp_path / "base", of_base)
    adapter = make_adapter("llama", base, tmp_path / "a", dtype=of_adapter, **config)
    merged_into(base, adapter, out=tmp_path / "out")
    before, after, change = tensors(base), tensors(tmp_path / "out"), oracle.changes(adapter)
    assert len(change) == 14
    for name, tensor in before.items():
        assert after[name].dtype == of_base
        if name not in change:
            assert torch.equal(after[name], tensor)
            continue
        wanted = tensor.double() + change[name]
        mass = tensor.double().abs() + products(adapter, name)
        assert within(after[name], wanted, mass), name


def products(adapter, name):
    """Return scale * |b| @ |a|: the sum of the magnitudes of what is added up."""
    files = oracle.read(adapter)
    module = name.removesuffix(".weight")
    a, b = (
        files.tensors[f"{oracle.PREFIX}{module}.{part}.weight"].abs()
        for part in ("lora_A", "lora_B")
    )
    return oracle.scale(files.config, module) * (b @ a)


@pytest.mark.parametrize("of_adapter", [torch.float32, torch.float64])
@pytest.mark.parametrize("of_base", [torch.bfloat16, torch.float32])
def test_what_is_written_in_float64_is_computed_in_it(tmp_path, of_base, of_adapter):
    config = KINDS["both_patterns"].config
    base = make_base("llama", tmp_path / "base", of_base)
    adapter = make_adapter("llama", base, tmp_path / "a", dtype=of_adapter, **config)
    merged_into(base, adapter, out=tmp_path / "out", dtype="float64")
    before, after, change = tensors(base), tensors(tmp_path / "out"), oracle.changes(adapter)
    for name, tensor in before.items():
        assert_close(after[name], tensor.double() + change.get(name, 0.0), 1e-13)


def test_a_dtype_in_the_recipe_is_that_of_the_result(tmp_path):
    base, adapter = make("plain", tmp_path)
    merged_into(base, adapter, out=tmp_path / "out", dtype="bfloat16")
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    wanted = oracle.changes(adapter)
    for name, tensor in tensors(tmp_path / "out").items():
        exact = tensors(base)[name] + wanted.get(name, 0.0)
        assert within(tensor, exact, exact.abs())


# several adapters, weights -----------------------------------------------------------------------


@pytest.fixture
def three(tmp_path):
    """Return a base and adapters of other ranks, targets, scales and dtypes."""
    base = make_base("llama", tmp_path / "base")
    plain = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj", "embed_tokens"]}
    patterned = KINDS["both_patterns"].config
    square = {
        "r": 2,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": ["q_proj", "down_proj"],
    }
    made = [
        make_adapter("llama", base, tmp_path / "a", seed=11, **plain),
        make_adapter("llama", base, tmp_path / "b", seed=12, dtype=torch.bfloat16, **patterned),
        make_adapter("llama", base, tmp_path / "c", seed=13, dtype=torch.float64, **square),
    ]
    return base, made


def test_several_adapters_are_added_up_as_peft_does(tmp_path, three):
    base, adapters = three
    merged_into(base, *adapters, out=tmp_path / "out")
    wanted = answers(load_adapted("llama", base, *adapters))
    assert_close(answers(load_base("llama", tmp_path / "out")), wanted)


@pytest.mark.parametrize("weights", [(0.5, 1.0, 1.0), (1.0, -1.0, 0.25), (0.0, 2.0, -3.0)])
def test_weights_scale_what_each_adapter_adds(tmp_path, three, weights):
    base, adapters = three
    merged_into(base, *adapters, out=tmp_path / "out", weights=weights)
    wanted = answers(scale(load_adapted("llama", base, *adapters), weights))
    assert_close(answers(load_base("llama", tmp_path / "out")), wanted)


def test_the_order_of_adapters_does_not_matter(tmp_path, three):
    base, adapters = three
    merged_into(base, *adapters, out=tmp_path / "one")
    merged_into(base, *reversed(adapters), out=tmp_path / "other")
    other = tensors(tmp_path / "other")
    for name, tensor in tensors(tmp_path / "one").items():
        assert_close(tensor, other[name], 1e-14)  # the order of a sum of three numbers below 10


def test_lengths_of_dora_are_those_of_the_original_weight(tmp_path):
    base, dora = make("dora", tmp_path)
    plain = make_adapter("llama", base, tmp_path / "plain", seed=12, **KINDS["plain"].config)
    merged_into(base, dora, plain, out=tmp_path / "one")
    merged_into(base, plain, dora, out=tmp_path / "other")
    # peft computes the lengths of the sum, unless the adapter that has them is the first
    wanted = answers(load_adapted("llama", base, dora, plain))
    for name in ("one", "other"):
        assert_close(answers(load_base("llama", tmp_path / name)), wanted)


@pytest.mark.parametrize("kind", ["dora", "dora_conv", "dora_fan_in_fan_out"])
def test_a_weight_scales_the_whole_change_of_dora(tmp_path, kind):
    base, dora = make(kind, tmp_path)
    with quiet():
        full = load_adapted(KINDS[kind].base, base, dora).merge_and_unload().state_dict()
    merged_into(base, dora, out=tmp_path / "out", weights=(0.5,))
    before = tensors(base)
    for name, tensor in tensors(tmp_path / "out").items():
        assert_close(tensor, before[name] + 0.5 * (full[name] - before[name]), 1e-12)


def test_two_adapters_that_save_the_same_module_cannot_be_added(tmp_path):
    base, first = make("head_saved", tmp_path)
    second = make_adapter("llama", base, tmp_path / "second", seed=12, **KINDS["head_saved"].config)
    with pytest.raises(MergeKitError, match="lm_head") as caught:
        merged_into(base, first, second, out=tmp_path / "out")
    assert caught.value.code() in (2, 3)
    assert not (tmp_path / "out").exists()


# in methods --------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path):
    """Return a base, two adapters, and both merged in float64 by the oracle."""
    base = make_base("llama", tmp_path / "base")
    plain, other = KINDS["plain"].config, KINDS["both_patterns"].config
    adapters = [
        make_adapter("llama", base, tmp_path / "a", seed=11, **{**plain, "r": 2}),
        make_adapter("llama", base, tmp_path / "b", seed=12, **other),
    ]
    whole = []
    for adapter in adapters:
        folder = tmp_path / f"whole-{adapter.name}"
        model = load_base("llama", base)
        for name, change in oracle.changes(adapter).items():
            with torch.no_grad():
                model.get_parameter(name).add_(change)
        model.save_pretrained(folder)
        whole.append(folder)
    return base, adapters, whole


METHODS = {
    "linear": {"parameters": {"weight": 1.0}},
    "task_arithmetic": {"parameters": {"lambda": 0.7}},
    "ties": {"parameters": {"density": 0.4}},
    "dare_linear": {"parameters": {"density": 0.5}, "seed": 3},
    "dare_ties": {"parameters": {"density": 0.5}, "seed": 3},
    "breadcrumbs": {"parameters": {"density": 0.5, "gamma": 0.05}},
    "della": {"parameters": {"density": 0.5, "epsilon": 0.1}, "seed": 3},
    "model_stock": {},
    "tsv": {},
}


def recipe(method, base, models, **more):
    entries = [
        {"model": model, "parameters": {"weight": weight}}
        for model, weight in zip(models, (0.8, -0.5), strict=True)
    ]
    with_base = {"base_model": str(base)} if method != "linear" else {}
    return {"merge_method": method, "models": entries, **with_base, **more}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_takes_base_plus_adapter_like_the_merged_model(tmp_path, pair, method):
    base, adapters, whole = pair
    more = METHODS[method]
    if method == "linear":
        more = {"parameters": {"normalize": False}}
    merge(recipe(method, base, [on(base, a) for a in adapters], **more), tmp_path / "one")
    merge(recipe(method, base, list(map(str, whole)), **more), tmp_path / "other")
    found, wanted = tensors(tmp_path / "one"), tensors(tmp_path / "other")
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert_close(tensor, wanted[name], 1e-11)


def test_ties_of_adapters_is_ties_of_their_changes(tmp_path, pair):
    base, adapters, _ = pair
    more = METHODS["ties"]
    merge(recipe("ties", base, [on(base, a) for a in adapters], **more), tmp_path / "out")
    found, before = tensors(tmp_path / "out"), tensors(base)
    changes = [oracle.changes(adapter) for adapter in adapters]
    for name in changes[0]:
        wanted = oracle.ties([c[name] for c in changes], (0.8, -0.5), (0.4, 0.4))
        assert_close(found[name], before[name] + wanted, 1e-12)


def test_task_arithmetic_of_adapters_is_one_sum(tmp_path, pair):
    base, adapters, _ = pair
    merge(recipe("task_arithmetic", base, [on(base, a) for a in adapters]), tmp_path / "out")
    changes = oracle.summed([oracle.changes(a) for a in adapters], (0.8, -0.5))
    found, before = tensors(tmp_path / "out"), tensors(base)
    for name, tensor in found.items():
        assert_close(tensor, before[name] + changes.get(name, 0.0), 1e-13)


def test_an_adapter_under_a_base_model_stands_for_both(tmp_path, pair):
    base, adapters, _ = pair
    more = METHODS["ties"]
    merge(recipe("ties", base, list(map(str, adapters)), **more), tmp_path / "one")
    merge(recipe("ties", base, [on(base, a) for a in adapters], **more), tmp_path / "other")
    other = tensors(tmp_path / "other")
    for name, tensor in tensors(tmp_path / "one").items():
        assert torch.equal(tensor, other[name])


def test_an_adapter_without_a_base_is_refused_with_the_way_to_write_it(tmp_path, pair):
    _, adapters, _ = pair
    with pytest.raises(MergeKitError, match=r"hint: .*\+") as caught:
        merge(recipe("linear", "", list(map(str, adapters))), tmp_path / "out")
    assert "adapter" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_threads_and_memory_change_no_bit(tmp_path):
    base = make_base("llama", tmp_path / "base", torch.bfloat16)
    adapter = make_adapter("llama", base, tmp_path / "a", **KINDS["both_patterns"].config)
    made = []
    for threads in (1, 3):
        models = [{"model": on(base, adapter)}]
        out = tmp_path / f"out{threads}"
        merge({"merge_method": "passthrough", "models": models}, out, threads=threads)
        made.append((out / "model.safetensors").read_bytes())
    assert made[0] == made[1]


# what is written beside the weights --------------------------------------------------------------


def test_config_and_manifest_say_what_was_merged(tmp_path):
    base, adapter = make("tied_tokens", tmp_path)
    done = merged_into(base, adapter, out=tmp_path / "out")
    assert (done.output / "config.json").read_text() == (base / "config.json").read_text()
    manifest = json.loads((done.output / "merge_kit.json").read_text())
    assert {entry["name"] for entry in manifest["inputs"]} == {"base", "adapter"}
    assert not (done.output / "adapter_config.json").exists()


def test_a_tokenizer_beside_the_adapter_is_not_taken_without_asking(tmp_path):
    base, adapter = make("plain", tmp_path)
    (base / "tokenizer_config.json").write_text('{"of": "base"}\n')
    (adapter / "tokenizer_config.json").write_text('{"of": "adapter"}\n')
    merged_into(base, adapter, out=tmp_path / "out")
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == {"of": "base"}


def test_a_head_that_outgrows_its_twin_is_untied_in_the_config(tmp_path):
    base, adapter = make("head_saved", tmp_path)
    tied = make_base("llama_tied", tmp_path / "tied")
    shutil.copytree(adapter, tmp_path / "of-tied")
    try:
        merged_into(tied, tmp_path / "of-tied", out=tmp_path / "out")
    except MergeKitError as error:
        assert "lm_head" in str(error)  # noqa: PT017
        return
    after = tensors(tmp_path / "out")
    saved = tensors(adapter)["base_model.model.lm_head.weight"].double()
    assert torch.equal(after["lm_head.weight"], saved)
    assert torch.equal(
        after["model.embed_tokens.weight"], tensors(tied)["model.embed_tokens.weight"]
    )
    assert not json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]
    assert base.name == "base"
    assert after["lm_head.weight"].shape[0] == VOCAB
