"""Families of decoders, by what is needed to make tiny models of them and to take them apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers

transformers.utils.logging.disable_progress_bar()

WINDOW = 4
VOCAB = 64
IMAGE = VOCAB - 1
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": 64,
}
MULTI_HEAD = {k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}
ENDS = {"embed": ("model.embed_tokens",), "after": ("model.norm", "lm_head")}


def every(period: int) -> Callable[[int], list[str]]:
    """Return the types of layers of which the last of each period sees everything."""
    return lambda depth: [
        "sliding_attention" if (i + 1) % period else "full_attention" for i in range(depth)
    ]


def mixed(depth: int) -> list[str]:
    """Return types with no period."""
    full = (1, 2, depth - 1)
    return ["full_attention" if i in full else "sliding_attention" for i in range(depth)]


def from_the_third(depth: int) -> list[str]:
    return ["full_attention"] * 2 + ["sliding_attention"] * (depth - 2)


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    Attributes:
        model: The class of transformers.
        config: Makes the config of a model of so many layers.
        depths: Layers of the models `a` and `b`.
        layers: Path of the list of layers in a loaded model.
        embed: Modules that lead in, taken from the model of the first layer.
        after: Modules that follow the layers, taken from the model of the last one.
        counted: Key of the config that counts the layers.
        types: Types of the layers of a model of so many.
        sliding: Whether some layer sees a window only.
        module: Name of the stack in a recipe, where the model has several.
        per_layer: Writes further values of the config by hand.
    """

    model: Any
    config: Callable[[int], Any]
    depths: tuple[int, int] = (4, 5)
    layers: str = "model.layers"
    embed: tuple[str, ...] = ENDS["embed"]
    after: tuple[str, ...] = ENDS["after"]
    counted: str = "num_hidden_layers"
    types: Callable[[int], list[str]] | None = None
    sliding: bool = False
    module: str = ""
    per_layer: Callable[[Any, list[Any]], None] = field(default=lambda _text, _origins: None)

    def depth(self, name: str) -> int:
        return self.depths["ab".index(name)]


def _decoder(name: str, more: Mapping[str, Any] | None = None, sizes: Any = None) -> Any:
    """Return what makes a config; values that are functions are given the depth."""
    made = getattr(transformers, f"{name}Config")

    def config(depth: int) -> Any:
        own = {k: v(depth) if callable(v) else v for k, v in (more or {}).items()}
        return made(**(sizes or SIZES), num_hidden_layers=depth, **own)

    return config


def _causal(name: str, more: Mapping[str, Any] | None = None, **about: Any) -> Family:
    sizes = about.pop("sizes", None)
    model = getattr(transformers, f"{name}ForCausalLM")
    return Family(model, _decoder(name, more, sizes), **about)


def _sliding(name: str, types: Any, more: Mapping[str, Any] | None = None, **about: Any) -> Family:
    own = {"sliding_window": WINDOW, "layer_types": types, **(more or {})}
    return _causal(name, own, types=types, sliding=True, **about)


def _gemma3_text(depth: int) -> Any:
    more = {"sliding_window": WINDOW, "query_pre_attn_scalar": 8, "layer_types": every(6)(depth)}
    return transformers.Gemma3TextConfig(**SIZES, num_hidden_layers=depth, **more)


def _gemma3(depth: int) -> Any:
    tower = {"num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
    sizes = {k: SIZES[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads")}
    return transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**sizes, **tower),
        text_config=_gemma3_text(depth),
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
        eos_token_id=None,
    )


def _gpt2(depth: int) -> Any:
    sizes = {"n_embd": 32, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB}
    return transformers.GPT2Config(**sizes, n_layer=depth, bos_token_id=1, eos_token_id=None)


def _dense_layers(text: Any, origins: list[Any]) -> None:
    """Say which layers of a mixture of experts have none."""
    text.mlp_only_layers = [
        i for i, (config, n) in enumerate(origins) if n in config.mlp_only_layers
    ]


def _t5(depth: int) -> Any:
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "vocab_size": VOCAB}
    return transformers.T5Config(
        **sizes,
        num_layers=12,  # transformers makes caches of so many layers
        num_decoder_layers=depth,
        decoder_start_token_id=0,
        eos_token_id=None,
        tie_word_embeddings=False,
    )


def _whisper(depth: int) -> Any:
    sides = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in (("attention_heads", 4), ("ffn_dim", 48), ("layers", 3))
    } | {"decoder_layers": depth}
    return transformers.WhisperConfig(
        **sides,
        d_model=32,
        vocab_size=VOCAB,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


_EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
_LONG = {  # as many factors as layers: no list of layers for all that
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 32,
        "partial_rotary_factor": 1.0,
    },
    "original_max_position_embeddings": 32,
}

FAMILIES = {
    "llama": _causal("Llama", {"tie_word_embeddings": False}),
    "mistral": _causal("Mistral", {"sliding_window": WINDOW}, sliding=True),
    "qwen2": _sliding(
        "Qwen2", from_the_third, {"use_sliding_window": True, "max_window_layers": 2},
        sizes={k: v for k, v in SIZES.items() if k != "head_dim"},
    ),
    "qwen3": _sliding("Qwen3", mixed, {"use_sliding_window": True}),
    "gemma2": _sliding("Gemma2", every(2), {"query_pre_attn_scalar": 8}),
    "gemma3_text": Family(
        transformers.Gemma3ForCausalLM, _gemma3_text, (6, 7), types=every(6), sliding=True
    ),
    "gemma3": Family(
        transformers.Gemma3ForConditionalGeneration,
        _gemma3,
        (6, 7),
        layers="model.language_model.layers",
        embed=(
            "model.language_model.embed_tokens",
            "model.vision_tower",
            "model.multi_modal_projector",
        ),
        after=("model.language_model.norm", "lm_head"),
        types=every(6),
        sliding=True,
    ),
    "phi3": _causal("Phi3", {"sliding_window": WINDOW, **_LONG}, sliding=True, sizes=MULTI_HEAD),
    "gpt2": Family(
        transformers.GPT2LMHeadModel,
        _gpt2,
        layers="transformer.h",
        embed=("transformer.wte", "transformer.wpe"),
        after=("transformer.ln_f", "lm_head"),
    ),
    "gpt_neox": _causal(
        "GPTNeoX", {"rotary_pct": 0.5}, sizes=MULTI_HEAD, layers="gpt_neox.layers",
        embed=("gpt_neox.embed_in",), after=("gpt_neox.final_layer_norm", "lm_head"),
    ),
    "mixtral": _causal("Mixtral", {"num_local_experts": 3, "sliding_window": WINDOW}, sliding=True),
    "qwen3_moe": _causal(
        "Qwen3Moe", {**_EXPERTS, "mlp_only_layers": [1], "norm_topk_prob": True},
        per_layer=_dense_layers,
    ),
    "olmo2": _causal("Olmo2", sizes={k: v for k, v in SIZES.items() if k != "head_dim"}),
    "cohere2": _sliding("Cohere2", every(4), {"logit_scale": 1.0}),
    "stablelm": _causal(
        "StableLm", {"qk_layernorm": True, "use_parallel_residual": False},
        sizes={k: v for k, v in SIZES.items() if k != "head_dim"},
    ),
    "t5": Family(
        transformers.T5ForConditionalGeneration,
        _t5,
        layers="decoder.block",
        embed=("shared", "encoder"),
        after=("decoder.final_layer_norm", "lm_head"),
        counted="num_decoder_layers",
        module="decoder",
    ),
    "whisper": Family(
        transformers.WhisperForConditionalGeneration,
        _whisper,
        layers="model.decoder.layers",
        embed=("model.encoder", "model.decoder.embed_tokens", "model.decoder.embed_positions"),
        after=("model.decoder.layer_norm",),
        counted="decoder_layers",
        module="decoder",
    ),
}  # fmt: skip
"""Every architecture by its name in the tests."""
