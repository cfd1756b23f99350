"""What adapters hold whole, beside the changes that are combined."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import save_file

from merge_kit import MergeKitError
from tests.adapters.claims import ALL, combined
from tests.adapters.makers import (
    KINDS,
    answers,
    changed,
    load_adapted,
    make,
    make_adapter,
    make_base,
    tensors,
)
from tests.oracles import adapters as oracle


@pytest.fixture(scope="module")
def holders(tmp_path_factory):
    """Return a base, an adapter that holds a head whole, another one, and one that does not."""
    folder = tmp_path_factory.mktemp("holders")
    base = make_base("llama", folder / "base")
    saves = KINDS["head_saved"].config
    return (
        base,
        make_adapter("llama", base, folder / "one", seed=71, **saves),
        make_adapter("llama", base, folder / "two", seed=72, **saves),
        make_adapter("llama", base, folder / "none", seed=73, **KINDS["plain"].config),
    )


HEAD = "base_model.model.lm_head.weight"


def test_a_module_that_one_adapter_holds_is_kept(tmp_path, holders):
    base, one, _, none = holders
    combined("lora_concat", [none, one], [0.5, 1.0], tmp_path / "out")
    assert torch.equal(tensors(tmp_path / "out")[HEAD], tensors(one)[HEAD])
    wanted = oracle.summed([oracle.changes(none), oracle.changes(one)], (0.5, 1.0))
    model = changed("llama", base, wanted)
    with torch.no_grad():
        model.lm_head.weight.copy_(tensors(one)[HEAD])
    found = answers(load_adapted("llama", base, tmp_path / "out"))
    assert float((found - answers(model)).abs().max()) <= 1e-4


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, -1.0), (0.5, 0.5)])
def test_a_module_that_two_hold_is_refused_by_name(tmp_path, holders, weights):
    _, one, two, _ = holders
    with pytest.raises(MergeKitError, match="lm_head") as caught:
        combined("lora_concat", [one, two], weights, tmp_path / "out")
    assert caught.value.code() in (2, 3)
    assert "saved" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_held_module_of_another_weight_than_1_is_refused_by_name(tmp_path, holders):
    _, one, _, none = holders
    with pytest.raises(MergeKitError, match="lm_head"):
        combined("lora_concat", [one, none], [0.5, 1.0], tmp_path / "out")


def test_held_modules_are_averaged_or_taken_from_the_first_where_asked(tmp_path, holders):
    base, one, two, _ = holders
    combined("lora_concat", [one, two], [1.0, 3.0], tmp_path / "mean", saved="mean")
    combined("lora_concat", [one, two], [1.0, 3.0], tmp_path / "first", saved="first")
    heads = [tensors(adapter)[HEAD].double() for adapter in (one, two)]
    mean = tensors(tmp_path / "mean")[HEAD].double()
    shares = [(0.25, 0.75), (0.5, 0.5)]  # by weight, or each alike: the method says which
    misses = [float((mean - a * heads[0] - b * heads[1]).abs().max()) for a, b in shares]
    assert min(misses) <= 1e-6
    assert torch.equal(tensors(tmp_path / "first")[HEAD].double(), heads[0])
    for name in ("mean", "first"):
        answers(load_adapted("llama", base, tmp_path / name))


def test_equal_modules_of_all_holders_are_kept(tmp_path, holders):
    _, one, two, none = holders
    shutil.copytree(two, tmp_path / "two")
    held = tensors(two) | {HEAD: tensors(one)[HEAD]}
    save_file(held, tmp_path / "two/adapter_model.safetensors")
    combined("lora_concat", [one, tmp_path / "two", none], [0.5, -0.5, 2.0], tmp_path / "out")
    assert torch.equal(tensors(tmp_path / "out")[HEAD], tensors(one)[HEAD])


@pytest.mark.parametrize("kind", ["bias_lora_only", "bias_all", "tokens", "norms_saved"])
def test_other_things_held_whole_are_kept_beside_others_or_refused_by_name(tmp_path, kind):
    base, holder = make(kind, tmp_path)
    name = KINDS[kind].base
    other = make_adapter(
        name, base, tmp_path / "other", seed=81, r=2, lora_alpha=3, target_modules=["o_proj"]
    )
    combined("lora_concat", [holder, other], [1.0, 0.5], tmp_path / "out")
    # peft calls a bias of a module that it adapts, as others do in the sum, one of the base_layer
    held = {n.replace(".base_layer", ""): t for n, t in tensors(tmp_path / "out").items()}
    had = {n.replace(".base_layer", ""): t for n, t in tensors(holder).items()}
    whole = [n for n in had if "lora_" not in n]
    assert whole
    assert all(torch.equal(held[n], had[n]) for n in whole)
    both = load_adapted(name, base, tmp_path / "out")
    alone = load_adapted(name, base, holder)
    assert float((answers(both) - answers(alone)).abs().max()) > 1e-3
    shutil.copytree(holder, tmp_path / "second")
    others = {n: t * 1.25 for n, t in tensors(holder).items()}
    save_file(others, tmp_path / "second/adapter_model.safetensors")
    with pytest.raises(MergeKitError) as caught:
        combined("lora_concat", [holder, tmp_path / "second"], [1.0, 1.0], tmp_path / "no")
    module = whole[0].removeprefix("base_model.model.").removesuffix(".weight")
    assert module.split(".token_adapter")[0] in str(caught.value)


@pytest.mark.parametrize("method", ALL)
def test_lengths_of_dora_cannot_be_combined(tmp_path, method):
    base, dora = make("dora", tmp_path)
    plain = make_adapter("llama", base, tmp_path / "plain", **KINDS["plain"].config)
    for adapters, weights in (([dora, plain], (1.0, 1.0)), ([dora], (0.5,))):
        with pytest.raises(MergeKitError, match="DoRA") as caught:
            combined(method, adapters, weights, tmp_path / "out")
        assert caught.value.code() in (2, 3)
        assert not (tmp_path / "out").exists()
