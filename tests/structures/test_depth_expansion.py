"""Models with a new layer after each of theirs compute what they did, in transformers."""

from __future__ import annotations

from typing import Any

import deepened
import pytest
import torch
import transformers
from families import FAMILIES, SIZES, WINDOW, Family

from merge_kit.api import merge
from merge_kit.errors import MergeKitError

pytestmark = pytest.mark.usefixtures("single_thread")

NO_HEAD_DIM = {k: v for k, v in SIZES.items() if k != "head_dim"}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
          "v_head_dim": 8, "head_dim": 4, "num_key_value_heads": 4}  # fmt: skip


def family(name: str, config: str, sizes: dict[str, Any], layers: str = "model.layers") -> Family:
    model, made = getattr(transformers, name), getattr(transformers, config)
    return Family(model, lambda depth: made(**sizes, num_hidden_layers=depth), layers=layers)


MORE = {
    "qwen2_moe": family("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {
        **NO_HEAD_DIM, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [1]}),
    "opt": family("OPTForCausalLM", "OPTConfig", {
        **NO_HEAD_DIM, "ffn_dim": 48, "word_embed_proj_dim": 32}, "model.decoder.layers"),
    "gpt_oss": family("GptOssForCausalLM", "GptOssConfig", {
        **SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "falcon": family("FalconForCausalLM", "FalconConfig", {
        **NO_HEAD_DIM, "new_decoder_architecture": True, "num_kv_heads": 2}, "transformer.h"),
    "deepseek_v3": family("DeepseekV3ForCausalLM", "DeepseekV3Config", {
        **SIZES, **EXPERTS, **LATENT, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1}),
    "mamba": family("MambaForCausalLM", "MambaConfig", {
        "hidden_size": 32, "vocab_size": 64, "state_size": 4, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": None}, "backbone.layers"),
}  # fmt: skip
KINDS = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox"]
KINDS += ["mixtral", "qwen3_moe", "olmo2", "stablelm"]
"""Those of which `families` has a model."""


def saved(name: str, folder) -> tuple[Family, Any]:
    made = MORE[name]
    model = deepened.build(made, "a", 1)
    model.save_pretrained(folder / "a")
    return made, deepened.load(made, folder / "a")


def assert_unchanged(kind: Family, dense: Any, source, out, layers: int) -> None:
    """Hold a model of so many layers to the one that it was made of: logits, and what it writes."""
    parameters = {"target_layers": layers, "block_expansion": True}
    recipe = {"merge_method": "depth_upscale", "models": [{"model": str(source)}]}
    merge({**recipe, "parameters": parameters}, out)
    made = deepened.load(kind, out)
    assert len(made.get_submodule(kind.layers)) == layers
    assert deepened.differences(kind, made, dense) < 1e-5
    prompt = deepened.tokens(WINDOW + 3)
    written = [deepened.generated(kind, m, prompt, 6, cache=True) for m in (made, dense)]
    assert torch.equal(*written)


@pytest.mark.parametrize("name", KINDS)
def test_a_layer_after_each_layer_changes_nothing(name, pair, tmp_path):
    kind, (folders, sources) = FAMILIES[name], pair(name)
    assert_unchanged(kind, sources["a"], folders["a"], tmp_path / "out", 2 * kind.depth("a"))


@pytest.mark.parametrize("name", MORE)
def test_models_of_other_layers_stay_what_they_are_too(name, tmp_path):
    kind, dense = saved(name, tmp_path)
    assert_unchanged(kind, dense, tmp_path / "a", tmp_path / "out", kind.depth("a") + 2)


def test_new_layers_learn(tmp_path):
    """Zeros get gradients: the copies are there to be trained."""
    kind, _ = saved("opt", tmp_path)
    recipe = {"merge_method": "depth_upscale", "models": [{"model": str(tmp_path / "a")}]}
    parameters = {"target_layers": 6, "block_expansion": True}
    merge({**recipe, "parameters": parameters}, tmp_path / "out")
    made = deepened.load(kind, tmp_path / "out")
    ids = deepened.tokens(8)
    made(input_ids=ids, labels=ids).loss.backward()
    new = made.get_submodule(kind.layers)[2]
    for module in (new.self_attn.out_proj, new.fc2):
        assert module.weight.abs().max() == 0
        assert module.weight.grad.abs().max() > 0


def test_bert_is_refused(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 9}
    config = transformers.BertConfig(**sizes, num_hidden_layers=2)
    transformers.BertModel(config).save_pretrained(tmp_path / "a")
    recipe = {"merge_method": "depth_upscale", "models": [{"model": str(tmp_path / "a")}]}
    with pytest.raises(MergeKitError) as caught:
        merge({**recipe, "parameters": {"target_layers": 4, "block_expansion": True}},
              tmp_path / "out")  # fmt: skip
    said = str(caught.value)
    assert "a copy of layer 0 of input-1:a would not be an identity" in said
    assert "output.LayerNorm" in said
    merge({**recipe, "parameters": {"target_layers": 4}}, tmp_path / "out")  # stacks it can


def test_opt_with_norms_on_the_stream_is_refused(tmp_path):
    sizes = {"hidden_size": 8, "ffn_dim": 8, "num_attention_heads": 1, "vocab_size": 9}
    more = {"word_embed_proj_dim": 8, "do_layer_norm_before": False, "num_hidden_layers": 2}
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, **more))
    model.save_pretrained(tmp_path / "a")
    recipe = {"merge_method": "depth_upscale", "models": [{"model": str(tmp_path / "a")}]}
    with pytest.raises(MergeKitError, match="do_layer_norm_before is false"):
        merge({**recipe, "parameters": {"target_layers": 3, "block_expansion": True}},
              tmp_path / "out")  # fmt: skip
