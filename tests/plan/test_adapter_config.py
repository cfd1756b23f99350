"""adapter_config.json as it is written: what peft makes of it."""

from __future__ import annotations

import json
import math

import peft
import pytest
import torch
from torch import nn

from merge_kit.errors import PlanError
from merge_kit.plan.adapters.config import adapter_config_text
from merge_kit.plan.adapters.made import OutModule


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.v = nn.Linear(8, 8)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.q = nn.Linear(8, 8)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(3, 8, 8))


class Net(nn.Module):
    """Modules whose names end with one another: "q", "layers.0.q", "layers.0.attn.q"."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.attn = Attention()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.experts = Experts()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11)


def module(name, rank=4, scale=2.0, **more):
    return OutModule("", name, more.pop("kind", "linear"), rank, scale, **more)


def loaded(text, tmp_path):
    """Return what peft puts into a model by a config: name -> (rank, scale)."""
    (tmp_path / "adapter_config.json").write_text(text)
    config = peft.LoraConfig.from_pretrained(str(tmp_path))
    config.base_model_name_or_path = None  # else peft warns that this is no org/base
    model = peft.get_peft_model(Net(), config)
    layers = {
        name.removeprefix("base_model.model."): one
        for name, one in model.named_modules()
        if isinstance(one, peft.tuners.lora.LoraLayer)
    }
    return model, {name: (one.r["default"], one.scaling["default"]) for name, one in layers.items()}


def template(tmp_path, **settings):
    config = peft.LoraConfig(**{"target_modules": ["q"], **settings})
    config.save_pretrained(str(tmp_path / "template"))
    return (tmp_path / "template" / "adapter_config.json").read_text()


ENDING = {
    "q": (4, 2.0),
    "layers.0.q": (6, 0.75),
    "layers.0.attn.q": (4, 2.0),
    "layers.1.q": (4, 0.1),
    "attn.q": (2, 2.0),
}


@pytest.mark.parametrize("order", [1, -1])
def test_modules_whose_names_end_with_one_another_get_their_own_rank_and_scale(order, tmp_path):
    modules = [module(name, *values) for name, values in ENDING.items()][::order]
    start = template(tmp_path, r=3, use_rslora=True, rank_pattern={"q": 5}, target_modules="all")
    _, found = loaded(adapter_config_text(start, modules), tmp_path)
    assert found == ENDING  # and neither layers.1.attn.q nor layers.1.attn.v


def test_a_new_config_has_what_peft_needs(tmp_path):
    text = adapter_config_text(None, [module("q", 3, 1.0)], base="org/base", revision="main")
    config = json.loads(text)
    assert config["base_model_name_or_path"] == "org/base"
    assert config["revision"] == "main"
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 3, "LORA")
    assert loaded(text, tmp_path)[1]["q"] == (3, 1.0)


def test_what_does_not_change_keeps_its_text(tmp_path):
    start = template(tmp_path, r=4, lora_alpha=8, lora_dropout=0.05, task_type="CAUSAL_LM")
    text = adapter_config_text(start, [module("q"), module("attn.q")], targets=["q"])
    assert text == start


def test_only_what_changes_is_patched(tmp_path):
    start = template(tmp_path, r=4, lora_alpha=8, use_rslora=True, base_model_name_or_path="b")
    text = adapter_config_text(start, [module("q", 8, 1.5)], targets=["q"])
    changed = [
        new.strip()
        for old, new in zip(start.splitlines(), text.splitlines(), strict=True)
        if old != new
    ]
    assert changed == ['"lora_alpha": 12,', '"r": 8,', '"use_rslora": false,']


def test_scales_come_out_to_the_last_bit_of_float32(tmp_path):
    scales = [1 / 3, 0.1 * 3, math.sqrt(2), 1e-7, 16 / math.sqrt(7)]
    names = ["q", "attn.q", "attn.v", "head", "layers.1.q"]
    modules = [module(n, 7, s) for n, s in zip(names, scales, strict=True)]
    _, found = loaded(adapter_config_text(None, modules), tmp_path)
    for name, scale in zip(names, scales, strict=True):
        assert found[name][1] == pytest.approx(scale, rel=1e-15)


def test_an_alpha_that_no_number_can_say_is_refused_with_its_module():
    with pytest.raises(PlanError, match=r"^attn\.q: the scale 1e\+308 at rank 4 is an alpha"):
        adapter_config_text(None, [module("q"), module("attn.q", 4, 1e308)])


def test_targets_that_leave_a_module_out_give_way_to_full_names(tmp_path):
    modules = [module("q"), module("head")]
    config = json.loads(adapter_config_text(None, modules, targets=["q"]))
    assert config["target_modules"] == "q|head"
    deep = [module("model.layers.0.q"), module("model.layers.1.q")]
    config = json.loads(adapter_config_text(None, deep, targets=["v"]))
    assert config["target_modules"] == ["model.layers.0.q", "model.layers.1.q"]


def test_modules_and_tokens_that_are_kept_whole(tmp_path):
    text = adapter_config_text(
        template(tmp_path, layers_to_transform=[0], layers_pattern="layers"),
        [module("layers.1.q")],
        saved_modules=["norm"],
        tokens={"embed": [3, 7]},
    )
    model, found = loaded(text, tmp_path)
    assert found.keys() == {"layers.1.q"}
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("norm.modules_to_save.default.weight" in name for name in names)
    assert any("embed.token_adapter.trainable_tokens_delta" in name for name in names)


def test_tokens_in_a_list_are_left_as_they_are(tmp_path):
    start = template(tmp_path, r=4, lora_alpha=8, trainable_token_indices=[3, 7])
    text = adapter_config_text(start, [module("q")], targets=["q"], tokens={"embed": [3, 7]})
    assert text == start


def test_an_adapter_without_modules_loads(tmp_path):
    text = adapter_config_text(None, [], saved_modules=["norm"])
    model, found = loaded(text, tmp_path)
    assert found == {}
    assert any("modules_to_save" in name for name, _ in model.named_parameters())


def test_biases_of_factors_and_embeddings(tmp_path):
    text = adapter_config_text(None, [module("head", bias=True)])
    model, _ = loaded(text, tmp_path)
    assert model.base_model.model.head.lora_B["default"].bias is not None
    text = adapter_config_text(None, [module("embed", 5, 0.5, kind="embedding")])
    assert loaded(text, tmp_path)[1]["embed"] == (5, 0.5)


def test_experts_choose_rank_and_scale_of_the_rest(tmp_path):
    modules = [module("q", 2, 1.0), module("attn.q", 2, 1.0)]
    modules.append(module("experts.up", 4, 0.5, kind="experts"))
    text = adapter_config_text(template(tmp_path, lora_dropout=0.1), modules)
    _, found = loaded(text, tmp_path)
    assert found["experts"] == (4, 0.5)
    assert found["q"] == (2, 1.0)


def test_experts_alone_target_no_module(tmp_path):
    text = adapter_config_text(None, [module("experts.up", 4, 0.5, kind="experts")])
    _, found = loaded(text, tmp_path)
    assert found == {"experts": (4, 0.5)}


def test_a_weight_that_is_chosen_as_a_parameter_is_no_module(tmp_path):
    modules = [module("head", 2, 1.0), module("layers.0.q", 4, 0.5)]
    text = adapter_config_text(None, modules, parameters=["head.weight"])
    config = json.loads(text)
    assert config["target_parameters"] == ["head.weight"]
    assert "head" not in config["target_modules"]
    model, found = loaded(text, tmp_path)
    assert found == {"head": (2, 1.0), "layers.0.q": (4, 0.5)}
    assert type(model.base_model.model.head).__name__ == "ParamWrapper"
