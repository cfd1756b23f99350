"""Tiny models of real architectures: their config.json texts and tensor names, as saved."""

from __future__ import annotations

import json
import struct
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

SMALL: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "pad_token_id": 0,
}
DECODER = {**SMALL, "num_key_value_heads": 1, "head_dim": 4}
VISION = {**SMALL, "num_hidden_layers": 4, "image_size": 8, "patch_size": 4}
MIXED = ["full_attention", "sliding_attention", "full_attention", "full_attention"]


def _llava() -> transformers.LlavaConfig:
    vision = transformers.CLIPVisionConfig(**VISION)
    text = transformers.LlamaConfig(**DECODER, num_hidden_layers=5)
    return transformers.LlavaConfig(vision_config=vision, text_config=text)


def _gemma3() -> transformers.Gemma3Config:
    vision = {key: value for key, value in VISION.items() if key != "vocab_size"}
    text = {**DECODER, "num_hidden_layers": 7, "sliding_window": 4}
    return transformers.Gemma3Config(vision_config=vision, text_config=text, mm_tokens_per_image=1)


WHISPER: dict[str, Any] = {
    "d_model": 8,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "vocab_size": 32,
    "num_mel_bins": 4,
    "max_source_positions": 8,
    "max_target_positions": 8,
    "encoder_layers": 4,
    "decoder_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}

MAKERS: dict[str, Any] = {
    "llama": lambda: (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**DECODER, num_hidden_layers=5),
    ),
    "qwen3": lambda: (
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config(
            **DECODER,
            num_hidden_layers=4,
            layer_types=MIXED,
            use_sliding_window=True,
            sliding_window=4,
        ),
    ),
    "gemma3_text": lambda: (
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig(**DECODER, num_hidden_layers=7, sliding_window=4),
    ),
    "gemma3": lambda: (transformers.Gemma3ForConditionalGeneration, _gemma3()),
    "gpt2": lambda: (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(n_embd=8, n_head=2, n_layer=4, vocab_size=32, n_positions=8),
    ),
    "mixtral": lambda: (
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig(**DECODER, num_hidden_layers=4, num_local_experts=2),
    ),
    "whisper": lambda: (
        transformers.WhisperForConditionalGeneration,
        transformers.WhisperConfig(**WHISPER),
    ),
    "t5": lambda: (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(d_model=8, d_ff=16, d_kv=4, num_heads=2, vocab_size=32, num_layers=4),
    ),
    "vit": lambda: (
        transformers.ViTForImageClassification,
        transformers.ViTConfig(**{k: v for k, v in VISION.items() if k != "vocab_size"}),
    ),
    "llava": lambda: (transformers.LlavaForConditionalGeneration, _llava()),
}


@cache
def config_text(kind: str) -> str:
    """Return config.json as transformers writes it."""
    return str(MAKERS[kind]()[1].to_json_string())


@cache
def names(kind: str) -> tuple[str, ...]:
    """Return the names of a saved checkpoint, from the header of its file."""
    model, config = MAKERS[kind]()
    with TemporaryDirectory() as folder:
        model(config).save_pretrained(folder)
        content = (Path(folder) / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return tuple(name for name in json.loads(content[8 : 8 + length]) if name != "__metadata__")


def loaded(kind: str, text: str) -> Any:
    """Return the model that transformers builds from a config text, on the meta device."""
    model, config = MAKERS[kind]()
    with torch.device("meta"):
        return model(type(config).from_dict(json.loads(text)))
