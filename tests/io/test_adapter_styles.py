from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from adapter_making import write_file, write_folder
from safetensors.torch import save_file

from merge_kit.errors import CheckpointError
from merge_kit.io.adapter import is_adapter, open_adapter

UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def pair(module, down="lora_down", up="lora_up", rank=2, conv=()):
    """Return the names of two factors with their shapes."""
    ones = (1,) * len(conv)
    first, second = (rank, 8, *conv), (6, rank, *ones)
    return {f"{module}.{down}.weight": first, f"{module}.{up}.weight": second}


def opened(path, tensors, metadata=None):
    """Return the adapter of a file, which is one by its look, with all its tensors in use."""
    write_file(path / "x.safetensors", tensors, metadata)
    assert is_adapter(path / "x.safetensors")
    adapter = open_adapter(path / "x.safetensors")
    assert sum(len(update.stored) for update in adapter.updates) == len(tensors)
    return adapter


def test_kohya_reads_alpha_from_its_tensor(tmp_path):
    tensors = {}
    for module, alpha in {
        "lora_unet_down_blocks_0_attn1_to_q": np.array(1.0, np.float32),
        "lora_te_text_model_encoder_layers_0_mlp_fc1": np.array([3], np.float16),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": np.array(4, np.int64),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": np.array(5.5, np.float64),
    }.items():
        tensors |= {**pair(module), f"{module}.alpha": alpha}
    adapter = opened(tmp_path, tensors | pair("lora_unet_without"))
    assert adapter.style == "kohya"
    assert {
        update.module: (update.rank, update.alpha, update.scale) for update in adapter.updates
    } == {
        "lora_unet_down_blocks_0_attn1_to_q": (2, 1.0, 0.5),
        "lora_te_text_model_encoder_layers_0_mlp_fc1": (2, 3.0, 1.5),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (2, 4.0, 2.0),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": (2, 5.5, 2.75),
        "lora_unet_without": (2, 2.0, 1.0),  # alpha is the rank where none is stored
    }
    assert (adapter.config, adapter.config_text, adapter.base) == ({}, None, "")


def test_an_alpha_in_bfloat16_is_read(tmp_path):
    tensors = {name: torch.zeros(shape) for name, shape in pair("lora_unet_x").items()}
    tensors["lora_unet_x.alpha"] = torch.tensor(0.75, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "x.safetensors")
    (update,) = open_adapter(tmp_path / "x.safetensors").updates
    assert (update.alpha, update.scale) == (0.75, 0.375)
    assert update.alpha_tensor.spec.name == "lora_unet_x.alpha"


def test_a_file_with_more_numbers_than_factors_is_an_adapter(tmp_path):
    numbers = {"lora_unet_x.alpha": np.array(1, np.float32), "lora_unet_x.dora_scale": (6, 1)}
    (update,) = opened(tmp_path, pair("lora_unet_x") | numbers).updates
    assert len(update.stored) == 4


def test_kohya_convolutions_have_the_kernel_in_the_first_factor(tmp_path):
    tensors = pair("lora_unet_conv_in", conv=(3, 3)) | pair("lora_unet_proj_in", conv=(1, 1))
    updates = {update.module: update for update in opened(tmp_path, tensors).updates}
    assert {update.kind for update in updates.values()} == {"convolution"}
    assert updates["lora_unet_conv_in"].a.spec.shape == (2, 8, 3, 3)


@pytest.mark.parametrize(("conv", "shape"), [((), (6, 1)), ((3, 3), (6, 1, 1, 1)), ((), (6,))])
def test_the_lengths_of_kohya_dora_are_those_of_outputs(tmp_path, conv, shape):
    tensors = pair("lora_unet_x", conv=conv) | {"lora_unet_x.dora_scale": shape}
    (update,) = opened(tmp_path, tensors).updates
    assert update.magnitude.spec.shape == shape


@pytest.mark.parametrize(
    ("conv", "shape"), [((), (1, 8)), ((3, 3), (1, 8, 1, 1)), ((3, 3), (1, 6, 1, 1))]
)
def test_lengths_of_inputs_are_another_method_and_refused(tmp_path, conv, shape):
    tensors = pair("lora_unet_x", conv=conv) | {"lora_unet_x.dora_scale": shape}
    write_file(tmp_path / "x.safetensors", tensors)
    with pytest.raises(CheckpointError, match="dora_scale' has shape"):
        open_adapter(tmp_path / "x.safetensors")


def test_diffusers_goes_by_the_config_in_its_metadata(tmp_path):
    tensors = pair("transformer.blocks.0.attn.to_q", "lora_A", "lora_B")
    tensors |= pair("transformer.blocks.0.ff", "lora_A", "lora_B", rank=3)
    tensors |= pair("text_encoder.layers.0.q_proj", "lora_A", "lora_B", rank=4)
    config = {
        "transformer.r": 2,
        "transformer.lora_alpha": 1,
        "transformer.rank_pattern": {"^blocks.0.ff": 3},
        "transformer.alpha_pattern": {"ff": 12},
        "transformer.peft_type": "LORA",
        "text_encoder.r": 4,
        "text_encoder.lora_alpha": 4,
        "text_encoder.use_rslora": True,
    }
    adapter = opened(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(config)})
    assert adapter.style == "diffusers"
    assert {update.module: update.scale for update in adapter.updates} == {
        "transformer.blocks.0.attn.to_q": 0.5,
        "transformer.blocks.0.ff": 4.0,
        "text_encoder.layers.0.q_proj": 2.0,
    }
    assert adapter.config == config
    assert json.loads(adapter.config_text) == config


def test_a_config_for_all_components_needs_no_names(tmp_path):
    text = json.dumps({"r": 2, "lora_alpha": 1})
    tensors = pair("blocks.0.to_q", "lora_A", "lora_B")
    (update,) = opened(tmp_path, tensors, {"lora_adapter_metadata": text}).updates
    assert update.scale == 0.5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_alpha": 1}, "names no component"),
        ({"transformer.r": 3}, "has rank 2 by its shape, and 3 by"),
        ({"transformer.r": 2, "transformer.use_qalora": True}, "QA-LoRA"),
    ],
)
def test_metadata_is_checked_as_a_config_is(tmp_path, config, message):
    tensors = pair("transformer.x", "lora_A", "lora_B")
    write_file(tmp_path / "x.safetensors", tensors, {"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(CheckpointError, match=message) as caught:
        open_adapter(tmp_path / "x.safetensors")
    assert "__metadata__" in f"{caught.value}"


def test_diffusers_without_metadata_scales_by_one(tmp_path):
    tensors = pair("unet.mid.attn.to_q", "lora_A", "lora_B")
    tensors |= pair("diffusion_model.double_blocks.0.img_attn.qkv", "lora_A", "lora_B", rank=3)
    adapter = opened(tmp_path, tensors)
    assert adapter.style == "diffusers"
    assert {(update.alpha, update.scale) for update in adapter.updates} == {(2.0, 1.0), (3.0, 1.0)}


def test_an_alpha_beside_factors_of_diffusers_is_read(tmp_path):
    alpha = {"diffusion_model.x.alpha": np.array(1.0, np.float32)}
    (update,) = opened(tmp_path, pair("diffusion_model.x", "lora_A", "lora_B") | alpha).updates
    assert update.scale == 0.5


def test_diffusers_biases_and_lengths_are_read(tmp_path):
    tensors = pair("transformer.x", "lora_A", "lora_B")
    more = {"transformer.x.lora_B.bias": (6,), "transformer.x.lora_magnitude_vector": (6,)}
    (update,) = opened(tmp_path, tensors | more).updates
    assert (update.bias.spec.shape, update.magnitude.spec.shape) == ((6,), (6,))


@pytest.mark.parametrize(
    ("written", "down", "up", "module"),
    [
        (f"{UNET}.processor.to_q_lora", "down", "up", f"{UNET}.to_q"),
        (f"{UNET}.processor.to_out_lora", "down", "up", f"{UNET}.to_out.0"),
        (f"{UNET}.to_k", "lora.down", "lora.up", f"{UNET}.to_k"),
        (f"{UNET}.to_out.0", "lora.down", "lora.up", f"{UNET}.to_out.0"),
        ("mid.attn1.processor.to_v_lora", "down", "up", "mid.attn1.to_v"),
        (
            "text_encoder.l.0.self_attn.to_out_lora",
            "down",
            "up",
            "text_encoder.l.0.self_attn.out_proj",
        ),
        (
            "text_encoder.l.0.self_attn.q_proj",
            "lora_linear_layer.down",
            "lora_linear_layer.up",
            "text_encoder.l.0.self_attn.q_proj",
        ),
    ],
)
def test_old_diffusers_names_are_those_of_modules_of_today(tmp_path, written, down, up, module):
    adapter = opened(tmp_path, pair(written, down, up))
    assert adapter.style == "old_diffusers"
    (update,) = adapter.updates
    assert (update.module, update.scale) == (module, 1.0)


def test_a_folder_with_one_file_is_that_file(tmp_path):
    write_file(tmp_path / "pytorch_lora_weights.safetensors", pair("unet.x", "lora_A", "lora_B"))
    (tmp_path / "README.md").write_text("hello")
    assert is_adapter(tmp_path)
    adapter = open_adapter(tmp_path)
    assert (adapter.style, adapter.checkpoint.is_file) == ("diffusers", False)


REFUSED = {
    "LoHa": {"lora_unet_x.hada_w1_a": (6, 2), "lora_unet_x.hada_w1_b": (2, 8)},
    "LoKr": {"lora_unet_x.lokr_w1": (2, 2), "lora_unet_x.lokr_w2": (3, 4)},
    "lora_mid": {**pair("lora_unet_x", conv=(1, 1)), "lora_unet_x.lora_mid.weight": (2, 2, 3, 3)},
    "IA3": {"lora_unet_x.weight": (8,), "lora_unet_x.on_input": (1,)},
    "OFT": {"lora_unet_x.oft_blocks": (2, 4, 4)},
    "split": {"lora_unet_x.lora_down.0.weight": (2, 8), "lora_unet_x.lora_up.0.weight": (3, 2)},
    "whole differences": {**pair("diffusion_model.x"), "diffusion_model.x.diff_b": (6,)},
    "textual inversion": {"emb_params": (3, 8)},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_are_refused_by_name(tmp_path, kind):
    write_file(tmp_path / "x.safetensors", REFUSED[kind])
    with pytest.raises(CheckpointError, match=kind) as caught:
        open_adapter(tmp_path / "x.safetensors")
    assert caught.value.hint


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "OFT"])
def test_other_kinds_are_adapters_all_the_same(tmp_path, kind):
    assert is_adapter(write_file(tmp_path / "x.safetensors", REFUSED[kind]))


def test_styles_are_not_mixed(tmp_path):
    write_file(
        tmp_path / "x.safetensors", pair("lora_unet_a") | pair("unet.b", "lora.down", "lora.up")
    )
    with pytest.raises(CheckpointError, match="styles of kohya and old_diffusers"):
        open_adapter(tmp_path / "x.safetensors")
    write_folder(tmp_path / "mixed", pair("lora_unet_a"), prefix="")
    with pytest.raises(CheckpointError, match="styles of kohya and peft"):
        open_adapter(tmp_path / "mixed")


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_a_scale_is_never_guessed(tmp_path, prefix):
    write_file(tmp_path / "x.safetensors", pair(f"{prefix}model.x", "lora_A", "lora_B"))
    with pytest.raises(CheckpointError, match="by what to scale") as caught:
        open_adapter(tmp_path / "x.safetensors")
    assert "adapter_config.json" in f"{caught.value}"
