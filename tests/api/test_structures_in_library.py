"""Methods that build models of another structure, called on paths, state dicts and results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import merge_kit as mk
from merge_kit.errors import MergeKitError, UsageError

DEMO = Path(__file__).parent.parent.parent / "recipes" / "demo"


@pytest.fixture(scope="module")
def base() -> dict[str, torch.Tensor]:
    return mk.load(DEMO / "base").state_dict()


def layers(tensors) -> int:
    return 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))


def test_what_a_path_yields_is_what_is_saved(tmp_path):
    deeper = mk.depth_upscale(DEMO / "base", target_layers=6)
    tensors = deeper.state_dict()
    assert layers(tensors) == 6
    saved = mk.load(deeper.save(tmp_path / "deeper")).state_dict()
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())
    assert (tmp_path / "deeper" / "merge_kit.json").exists()


def test_a_state_dict_is_stacked_by_its_names(base):
    deeper = mk.depth_upscale(base, target_layers=6).state_dict()
    assert layers(deeper) == 6
    for out, source in enumerate((0, 1, 2, 1, 2, 3)):
        name = "mlp.up_proj.weight"
        assert torch.equal(
            deeper[f"model.layers.{out}.{name}"], base[f"model.layers.{source}.{name}"]
        )


def test_a_built_model_stands_where_a_model_may(base):
    wider = mk.pad(DEMO / "base", intermediate_size=512)
    back = mk.linear([mk.crop(wider, intermediate_size=320), DEMO / "base"], weight=[0.5, 0.5])
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, base[name]), name


def test_experts_are_one_a_model(base):
    experts = [DEMO / skill for skill in ("add", "sort")]
    mixture = mk.sparse_upcycle(DEMO / "base", experts, router="zero").state_dict()
    for number, expert in enumerate(experts):
        own = mk.load(expert).state_dict()["model.layers.1.mlp.gate_proj.weight"]
        name = f"model.layers.1.block_sparse_moe.experts.{number}.w1.weight"
        assert torch.equal(mixture[name], own)
    assert torch.equal(mixture["model.norm.weight"], base["model.norm.weight"])


def test_what_is_found_of_weights_is_found_in_memory_too(tmp_path):
    narrow = mk.project(DEMO / "base", hidden_size=96)
    tensors = narrow.state_dict()
    saved = mk.load(narrow.save(tmp_path / "narrow")).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())
    assert tensors["model.norm.weight"].shape == (96,)


def test_what_is_found_of_a_merge_is_found_of_its_result(tmp_path):
    mean = mk.linear([DEMO / "add", DEMO / "sort"], weight=[0.5, 0.5])
    whole = mk.load(mean.save(tmp_path / "mean"))
    wanted = mk.project(whole, hidden_size=32).state_dict()
    streamed = mk.load(mk.project(mean, hidden_size=32).save(tmp_path / "out")).state_dict()
    memory = mk.project(mean, hidden_size=32).state_dict()
    for name, tensor in wanted.items():
        scale = float(tensor.float().abs().max())
        assert torch.allclose(memory[name].float(), tensor.float(), atol=0.02 * scale), name
        assert torch.equal(memory[name], streamed[name]), name


def test_tensors_alone_are_no_model():
    with pytest.raises(UsageError, match="builds models") as caught:
        mk.merge_tensors("pad", [torch.ones(2)])
    assert "path or a state dict" in str(caught.value)


def test_what_only_a_config_tells_is_asked_for(base):
    for build in (lambda: mk.sparse_upcycle(base, num_experts=2), lambda: mk.pad(base)):
        with pytest.raises(MergeKitError) as caught:
            build().state_dict()
        assert "config.json" in str(caught.value)


def test_a_base_alone_is_the_model(base):
    deeper = mk.depth_upscale(base=DEMO / "base", target_layers=6).state_dict()
    assert layers(deeper) == 6
    with pytest.raises(UsageError) as caught:
        mk.pad("large", "small")
    assert "pad(model, ...)" in str(caught.value)


def test_the_record_says_which_experts_were_matched(tmp_path):
    experts = [DEMO / skill for skill in ("add", "sort", "translate")]
    first = mk.sparse_upcycle(DEMO / "base", experts).save(tmp_path / "first")
    second = mk.sparse_upcycle(DEMO / "base", experts[::-1]).save(tmp_path / "second")
    out = mk.match_experts(first, [second]).save(tmp_path / "out")
    orders = json.loads((out / "merge_kit.json").read_text())["orders"]
    assert len(orders) == 4
    assert all(order["experts"] == [2, 1, 0] for order in orders.values())
    assert "## Experts" in (out / "README.md").read_text()
