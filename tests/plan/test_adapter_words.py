"""What a user is told who asks for something near to what adapters can do."""

from __future__ import annotations

import pytest

from merge_kit import MergeKitError, merge, plan
from merge_kit.io.checkpoint import open_checkpoint
from merge_kit.plan.describe import merged_by_method
from merge_kit.publish.manifest import read_manifest
from tests.plan.adapters_by_hand import adapter, base, factors

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A base and two adapters of rank 2 in the working directory."""
    base(tmp_path / "base")
    spec = open_checkpoint(tmp_path / "base").components[0].tensors[f"{Q}.weight"].spec
    for name, start in (("one", 1), ("two", 5)):
        adapter(tmp_path / name, factors(Q, *spec.shape, start=start))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_passthrough_of_an_adapter_alone_merges_it_into_the_base(folder):
    merge({"merge_method": "passthrough", "base_model": "base", "models": [{"model": "one"}]}, "a")
    merge({"merge_method": "passthrough", "models": [{"model": "base+one"}]}, "b")
    one, other = (folder / name / "model.safetensors" for name in "ab")
    assert one.read_bytes() == other.read_bytes()


def test_passthrough_of_a_model_and_an_unlisted_base_stays_two_models(folder):
    recipe = {
        "merge_method": "passthrough",
        "base_model": "base",
        "models": [{"model": "base+one"}],
    }
    with pytest.raises(MergeKitError, match="passthrough takes 1 model, found 2"):
        plan(recipe)


def test_a_weight_under_passthrough_says_where_an_adapter_has_its_own(folder):
    entry = {"model": "base+one", "parameters": {"weight": 0.5}}
    (note,) = plan({"merge_method": "passthrough", "models": [entry]}).notes
    assert "write lora: [{path: ADAPTER, weight: 0.5}]" in note


def test_an_adapter_beside_a_model_says_where_it_belongs(folder):
    entry = {"model": "base", "lora": "one"}
    with pytest.raises(MergeKitError) as caught:
        plan({"merge_method": "passthrough", "models": [entry]})
    assert "write model: {model: NAME, lora: ADAPTER}" in str(caught.value)


def test_a_rank_that_no_change_has_is_said_to_be_less(folder):
    recipe = {
        "merge_method": "lora_svd",
        "models": [{"model": "one"}, {"model": "two"}],
        "parameters": {"rank": 9},
    }
    made = plan(recipe)
    assert made.ranks[0].rank == 3  # 2 + 2 in a matrix of 3 by 3
    assert made.notes == (
        "the rank of 1 module is 3, less than asked for: their changes have no more",
    )
    recipe["parameters"] = {"rank": 3}
    assert plan(recipe).notes == ()


def test_factors_that_are_laid_side_by_side_are_counted_under_their_method(folder):
    models = [{"model": "one"}, {"model": "two", "parameters": {"weight": 0.3}}]
    made = plan({"merge_method": "lora_concat", "models": models})
    assert merged_by_method(made) == {"lora_concat": 2}


def test_one_of_several_adapters_is_verified_in_the_folder_above(folder):
    recipe = {
        "merge_method": "lora_concat",
        "models": [{"model": "one"}, {"model": "two"}],
        "uses": {"both": [1, 1]},
    }
    merge(recipe, "out")
    with pytest.raises(MergeKitError) as caught:
        read_manifest(folder / "out" / "both")
    assert str(folder / "out") in caught.value.hint


def test_a_path_that_is_nearly_right_is_named(folder):
    (folder / "adapters").mkdir()
    (folder / "one").rename(folder / "adapters" / "sort")
    with pytest.raises(MergeKitError) as caught:
        plan({"merge_method": "lora_concat", "models": [{"model": "adapters/sor"}]})
    assert "did you mean 'adapters/sort'?" in str(caught.value)
    with pytest.raises(MergeKitError) as caught:
        plan({"merge_method": "lora_concat", "models": [{"model": "org/name"}]})
    assert "hf download org/name" in str(caught.value)
