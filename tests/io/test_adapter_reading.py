from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
from adapter_making import CONFIG, LINEAR, made_by_peft, write_file, write_folder
from torch import nn

from merge_kit.errors import CheckpointError, Problems
from merge_kit.io.adapter import is_adapter, open_adapter


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 6)


class Experts(nn.Module):
    """Fused experts, named and ordered as models of mixtures have them."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 10, 8))
        self.down_proj = nn.Parameter(torch.zeros(4, 8, 5))


class Tiny(nn.Module):
    """A layer of each kind."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(12, 8)
        self.layers = nn.ModuleList(Attention() for _ in range(3))
        self.conv1, self.conv2 = nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, (3, 2))
        self.conv3, self.grouped = nn.Conv3d(4, 6, (1, 2, 3)), nn.Conv2d(4, 8, 3, groups=2)
        self.experts, self.norm, self.lm_head = Experts(), nn.LayerNorm(8), nn.Linear(8, 12)

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, x):
        return x


def all_names(adapter):
    """Every tensor that has a meaning, with repeats."""
    updates = [one.spec.name for update in adapter.updates for one in update.stored]
    whole = [one.stored.spec.name for one in (*adapter.saved, *adapter.rows)]
    return Counter([*updates, *whole, *adapter.dropped])


VARIANTS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "regular expression": {"target_modules": r".*layers\.[12]\.v_proj"},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r"layers\.[01]\.q_proj": 3, "v_proj": 5, "^layers.2.q_proj": 7},
        "alpha_pattern": {"layers.2.*": 6, "v_proj": 10},
        "use_rslora": True,
    },
    "embedding": {"target_modules": ["embed_tokens", "lm_head"]},
    "convolutions": {"target_modules": ["conv1", "conv2", "conv3"]},
    "dora": {
        "target_modules": ["q_proj", "embed_tokens", "conv1", "conv2", "conv3"],
        "use_dora": True,
    },
    "bias of b": {"target_modules": ["q_proj", "conv2"], "lora_bias": True},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "own biases": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "saved modules": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "v_proj"]},
    "saved and biased": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["norm"],
        "bias": "all",
    },
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3]},
    "tokens by name": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [7, 3]},
    },
    "experts": {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
        "rank_pattern": {"experts.gate_up_proj": 3},
    },
    "one parameter": {"target_modules": [], "target_parameters": ["down_proj"]},
    "parameter of a layer": {
        "target_modules": ["q_proj"],
        "target_parameters": ["layers.0.v_proj.weight"],
    },
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function that gives the folder and peft's model of a variant, made once."""
    kept = {}

    def make(variant):
        if variant not in kept:
            folder = tmp_path_factory.mktemp("adapter")
            config = {"r": 2, "lora_alpha": 5, **VARIANTS[variant]}
            kept[variant] = folder, made_by_peft(Tiny(), folder, **config)
        return kept[variant]

    return make


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_that_peft_writes_has_one_meaning(made, variant):
    folder, _ = made(variant)
    adapter = open_adapter(folder)
    stored = adapter.checkpoint.components[0].tensors
    assert all_names(adapter) == Counter(list(stored))
    assert adapter.style == "peft"
    assert adapter.config == json.loads(adapter.config_text)
    assert is_adapter(folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_alphas_and_scales_are_those_of_peft(made, variant):
    folder, model = made(variant)
    layers = dict(model.base_model.model.named_modules())
    adapter = open_adapter(folder)
    assert adapter.updates
    for update in adapter.updates:
        place = update.a.spec.name.removeprefix("base_model.model.").partition(".lora_")[0]
        layer = layers[place]
        assert update.rank == layer.r["default"]
        assert update.alpha == layer.lora_alpha["default"]
        assert update.scale == layer.scaling["default"]


def test_the_factors_of_each_kind_have_the_shapes_that_are_promised(made):
    found = {u.module: u for u in open_adapter(made("embedding")[0]).updates}
    found |= {u.module: u for u in open_adapter(made("convolutions")[0]).updates}
    found |= {u.module: u for u in open_adapter(made("experts")[0]).updates}
    shapes = {name: (u.kind, u.a.spec.shape, u.b.spec.shape) for name, u in found.items()}
    assert shapes == {
        "embed_tokens": ("embedding", (2, 12), (8, 2)),
        "lm_head": ("linear", (2, 8), (12, 2)),
        "conv1": ("convolution", (2, 4, 3), (6, 2, 1)),
        "conv2": ("convolution", (2, 4, 3, 2), (6, 2, 1, 1)),
        "conv3": ("convolution", (2, 4, 1, 2, 3), (6, 2, 1, 1, 1)),
        "layers.0.q_proj": ("linear", (2, 8), (8, 2)),
        "layers.1.q_proj": ("linear", (2, 8), (8, 2)),
        "layers.2.q_proj": ("linear", (2, 8), (8, 2)),
        "experts.gate_up_proj": ("experts", (12, 8), (10, 12)),
        "experts.down_proj": ("experts", (8, 5), (8, 8)),
    }
    assert found["experts.gate_up_proj"].experts == found["experts.down_proj"].experts == 4


@pytest.mark.parametrize("variant", ["experts", "one parameter", "parameter of a layer", "plain"])
def test_the_change_worked_out_from_an_update_is_that_of_peft(made, variant):
    folder, model = made(variant)
    for update in open_adapter(folder).updates:
        place = update.a.spec.name.removeprefix("base_model.model.").partition(".lora_")[0]
        layer = model.base_model.model.get_submodule(place)
        with torch.no_grad():
            torch.manual_seed(1)
            a = layer.lora_A["default"].weight.normal_()
            b = layer.lora_B["default"].weight.normal_()
            expected = layer.get_delta_weight("default")
        if update.kind == "linear":
            assert torch.allclose(update.scale * b @ a, expected, atol=1e-6)
            continue
        for expert in range(update.experts):
            its_a = a[expert * update.rank : (expert + 1) * update.rank]
            its_b = b[:, expert :: update.experts]
            assert torch.allclose(update.scale * its_b @ its_a, expected[expert], atol=1e-6)


def test_patterns_are_taken_in_order_rank_and_alpha_apart(made):
    adapter = open_adapter(made("patterns")[0])
    found = {update.module: (update.rank, update.alpha, update.scale) for update in adapter.updates}
    assert found["layers.0.q_proj"] == (3, 5, 5 / math.sqrt(3))
    assert found["layers.2.q_proj"] == (7, 6, 6 / math.sqrt(7))
    assert found["layers.2.v_proj"] == (5, 6, 6 / math.sqrt(5))
    assert found["layers.0.v_proj"] == (5, 10, 10 / math.sqrt(5))


def test_what_is_saved_whole_says_why(made):
    def saved(variant):
        return {one.tensor: one.why for one in open_adapter(made(variant)[0]).saved}

    assert saved("embedding") == {
        "embed_tokens.weight": "base_layer",
        "lm_head.weight": "base_layer",
        "lm_head.bias": "base_layer",
    }
    assert saved("own biases") == {f"layers.{n}.q_proj.bias": "bias" for n in range(3)}
    every = {name for name, _ in Tiny().named_parameters() if name.endswith("bias")}
    assert saved("all biases") == dict.fromkeys(every, "bias")
    modules = [f"layers.{n}.v_proj" for n in range(3)] + ["norm"]
    expected = [f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]
    assert saved("saved modules") == dict.fromkeys(expected, "modules_to_save")
    assert saved("saved and biased")["norm.bias"] == "modules_to_save"
    assert saved("saved and biased")["conv1.bias"] == "bias"


def test_copies_beside_a_saved_module_are_dropped_by_name(made):
    dropped = open_adapter(made("saved and biased")[0]).dropped
    assert dropped == {
        "base_model.model.norm.modules_to_save.bias": (
            "a copy of the same tensor of a module that is saved whole"
        ),
        "base_model.model.norm.original_module.bias": (
            "the base's own, beside a module that is saved whole"
        ),
    }


@pytest.mark.parametrize("variant", ["tokens", "tokens by name"])
def test_rows_of_tokens_are_in_the_order_of_the_config(made, variant):
    (rows,) = open_adapter(made(variant)[0]).rows
    assert (rows.module, rows.tokens) == ("embed_tokens", (7, 3))
    assert rows.stored.spec.shape == (2, 8)


def test_dora_has_a_length_for_each_output(made):
    adapter = open_adapter(made("dora")[0])
    shapes = {update.module: update.magnitude.spec.shape for update in adapter.updates}
    assert shapes["layers.0.q_proj"] == (8,)
    assert shapes["embed_tokens"] == (8,)
    assert shapes["conv2"] == (1, 6, 1, 1)


def test_a_bias_of_b_goes_with_its_update(made):
    adapter = open_adapter(made("bias of b")[0])
    shapes = {update.module: update.bias.spec.shape for update in adapter.updates}
    assert shapes["conv2"] == (6,)


def test_a_grouped_convolution_is_refused(tmp_path):
    made_by_peft(Tiny(), tmp_path, r=2, target_modules=["grouped"])
    with pytest.raises(CheckpointError, match="grouped convolution"):
        open_adapter(tmp_path)


def test_a_multihead_attention_is_refused(tmp_path):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return x

    made_by_peft(Wrapper(), tmp_path, r=2, target_modules=["attention"])
    with pytest.raises(CheckpointError, match="part of torch's MultiheadAttention"):
        open_adapter(tmp_path)


def test_fan_in_fan_out_is_said_of_linear_layers_only(tmp_path):
    embedding = {"e.lora_embedding_A": (2, 9), "e.lora_embedding_B": (4, 2)}
    write_folder(tmp_path, LINEAR | embedding, fan_in_fan_out=True)
    found = {update.module: update.transposed for update in open_adapter(tmp_path).updates}
    assert found == {"l.q_proj": True, "e": False}


def test_embeddings_that_have_grown_are_saved_whole(tmp_path):
    grown = {"lm_head.weight": (14, 8), "model.embed_tokens.weight": (14, 8)}
    write_folder(tmp_path, LINEAR | grown)
    saved = open_adapter(tmp_path).saved
    assert {one.tensor: one.why for one in saved} == dict.fromkeys(grown, "modules_to_save")


def test_embeddings_that_are_saved_on_demand_are_told_from_their_wrappers(tmp_path):
    rows, whole = (2, 8), (9, 8)
    tied = {"head.token_adapter.trainable_tokens_delta": rows}
    saved = {
        "e.token_adapter.base_layer.weight": whole,
        "e.token_adapter.trainable_tokens_delta": rows,
    }
    write_folder(tmp_path, LINEAR | saved | tied, trainable_token_indices=[4, 2])
    adapter = open_adapter(tmp_path)
    assert [(one.tensor, one.why) for one in adapter.saved] == [("e.weight", "base_layer")]
    assert {(one.module, one.tokens) for one in adapter.rows} == {("e", (4, 2)), ("head", (4, 2))}


def test_a_saved_embedding_comes_once_however_often_it_is_written(tmp_path):
    copies = {f"e.{name}weight": (9, 8) for name in ("", "modules_to_save.", "original_module.")}
    write_folder(tmp_path, LINEAR | copies, modules_to_save=["e"])
    adapter = open_adapter(tmp_path)
    assert [one.tensor for one in adapter.saved] == ["e.weight"]
    assert len(adapter.dropped) == 2


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("label", ["", ".default", ".mine"])
def test_older_spellings_are_read(tmp_path, prefix, label):
    tensors = {
        f"l.q_proj.lora_A{label}.weight": (2, 8),
        f"l.q_proj.lora_B{label}.weight": (6, 2),
        f"l.q_proj.lora_magnitude_vector{label}.weight": (6,),
        f"e.lora_embedding_A{label}": (2, 9),
        f"e.lora_embedding_B{label}": (4, 2),
        f"e.lora_magnitude_vector{label}": (4,),
        "head.modules_to_save.default.weight": (3, 3),
    }
    write_folder(tmp_path, tensors, prefix, use_dora=True, modules_to_save=["head"])
    adapter = open_adapter(tmp_path)
    assert {update.module for update in adapter.updates} == {"l.q_proj", "e"}
    assert all(update.magnitude for update in adapter.updates)
    assert [one.tensor for one in adapter.saved] == ["head.weight"]


def test_converted_experts_are_told_from_the_router_beside_them(tmp_path):
    tensors = {
        "l.experts.base_layer.lora_A.weight": (8, 16),  # 2 experts of rank 4
        "l.experts.base_layer.lora_B.weight": (48, 8),
        "l.experts.lora_A.weight": (4, 24),
        "l.experts.lora_B.weight": (16, 4),
        "l.gate.lora_A.weight": (2, 16),
        "l.gate.lora_B.weight": (2, 2),
    }
    write_folder(
        tmp_path,
        LINEAR | tensors,
        target_parameters=["down_proj", "gate.weight", "gate_up_proj"],
        rank_pattern={r".*\.gate_up_proj": 4},
        alpha_pattern={r".*\.gate_up_proj": 16},
    )
    updates = open_adapter(tmp_path).updates
    assert {u.module: (u.kind, u.rank, u.scale, u.experts) for u in updates} == {
        "l.q_proj": ("linear", 2, 4.0, 0),
        "l.experts.gate_up_proj": ("experts", 4, 4.0, 2),
        "l.experts.down_proj": ("experts", 2, 4.0, 2),
        "l.gate": ("linear", 2, 4.0, 0),
    }


@pytest.mark.parametrize("targets", ["all-linear", r"l\.q_proj"])
def test_layers_are_told_from_parameters_without_a_list(tmp_path, targets):
    experts = {"l.experts.lora_A.weight": (8, 5), "l.experts.lora_B.weight": (8, 8)}
    write_folder(
        tmp_path, LINEAR | experts, target_modules=targets, target_parameters=["down_proj"]
    )
    kinds = {update.module: update.kind for update in open_adapter(tmp_path).updates}
    assert kinds == {"l.q_proj": "linear", "l.experts.down_proj": "experts"}


def test_nested_parameters_of_unknown_order_are_refused(tmp_path):
    nested = {
        "m.base_layer.lora_A.weight": (2, 8),
        "m.base_layer.lora_B.weight": (5, 2),
        "m.lora_A.weight": (2, 6),
        "m.lora_B.weight": (8, 2),
    }
    write_folder(tmp_path, nested, target_parameters=["m.w", "m.v"])
    with pytest.raises(CheckpointError, match="cannot tell which parameter is changed by m"):
        open_adapter(tmp_path)


def test_shards_are_read_through_their_index(tmp_path):
    names = [f"base_model.model.{name}" for name in LINEAR]
    shards = [f"adapter_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for shard, name, shape in zip(shards, names, LINEAR.values(), strict=True):
        write_file(tmp_path / shard, {name: shape})
    index = {"metadata": {"total_size": 112}, "weight_map": dict(zip(names, shards, strict=True))}
    (tmp_path / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    adapter = open_adapter(tmp_path)
    assert [update.module for update in adapter.updates] == ["l.q_proj"]
    assert [file.name for file in adapter.checkpoint.components[0].files] == shards


def test_the_adapter_is_taken_from_a_folder_with_a_model(tmp_path):
    write_folder(tmp_path, LINEAR)
    write_file(tmp_path / "model.safetensors", {"l.q_proj.weight": (6, 8)})
    (tmp_path / "config.json").write_text("{}")
    adapter = open_adapter(tmp_path)
    assert [update.module for update in adapter.updates] == ["l.q_proj"]
    assert "model.safetensors" in adapter.checkpoint.left_out
    assert not is_adapter(tmp_path)  # as a model, the folder is the model


def test_the_file_alone_finds_its_config_beside_it(tmp_path):
    folder = write_folder(tmp_path / "mine", LINEAR, lora_alpha=3)
    (update,) = open_adapter(folder / "adapter_model.safetensors").updates
    assert update.scale == 1.5


def test_base_and_revision_are_text_and_nothing_else(tmp_path):
    write_folder(tmp_path, LINEAR, base_model_name_or_path="../../etc/base", revision="main")
    adapter = open_adapter(tmp_path, "mine")
    assert (adapter.base, adapter.revision) == ("../../etc/base", "main")
    assert adapter.checkpoint.name == "mine"


def test_base_and_revision_may_be_absent(tmp_path):
    write_folder(tmp_path, LINEAR, base_model_name_or_path=None)
    adapter = open_adapter(tmp_path)
    assert (adapter.base, adapter.revision) == ("", "")
    assert adapter.checkpoint.name == tmp_path.name


def test_what_is_no_adapter_is_none(tmp_path):
    assert not is_adapter(tmp_path / "absent")
    assert not is_adapter(tmp_path)
    model = write_file(tmp_path / "model.safetensors", {"l.q_proj.weight": (6, 8)})
    assert not is_adapter(model)
    assert not is_adapter(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    assert not is_adapter(tmp_path / "broken.safetensors")


def test_a_model_with_a_few_factors_in_it_is_a_model(tmp_path):
    named = {f"w{n}.weight": (2, 2) for n in range(9)}
    assert not is_adapter(write_file(tmp_path / "m.safetensors", named | LINEAR))
    with pytest.raises((CheckpointError, Problems)):
        open_adapter(tmp_path / "m.safetensors")
