"""Tiny random decoders whose sizes are changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from merge_kit.api import merge

transformers.utils.logging.disable_progress_bar()

VOCAB = 40
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": 64,
}
WIDER = {
    "hidden_size": 80,
    "intermediate_size": 72,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
"""By no factor whose root is a power of two."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One architecture: a class of transformers and its config, with values of its own."""

    model: Any
    config: Any
    more: Mapping[str, Any] = field(default_factory=dict)

    def make(self, **changes: Any) -> Any:
        return self.config(**{**SIZES, **self.more, **changes})


_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "mlp_only_layers": [0],
    "norm_topk_prob": True,
}
T = transformers
KINDS = {
    "llama": Kind(
        T.LlamaForCausalLM,
        T.LlamaConfig,
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ),
    "tied_llama": Kind(T.LlamaForCausalLM, T.LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": Kind(T.MistralForCausalLM, T.MistralConfig, {"sliding_window": None}),
    "qwen2": Kind(T.Qwen2ForCausalLM, T.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": Kind(T.Qwen3ForCausalLM, T.Qwen3Config, {"head_dim": 8, "rms_norm_eps": 1e-2}),
    "phi3": Kind(T.Phi3ForCausalLM, T.Phi3Config, {"tie_word_embeddings": False}),
    "mixtral": Kind(
        T.MixtralForCausalLM,
        T.MixtralConfig,
        {"num_local_experts": 3, "tie_word_embeddings": False},
    ),
    "qwen2_moe": Kind(
        T.Qwen2MoeForCausalLM,
        T.Qwen2MoeConfig,
        {**_EXPERTS, "shared_expert_intermediate_size": 20, "tie_word_embeddings": False},
    ),
    "qwen3_moe": Kind(
        T.Qwen3MoeForCausalLM,
        T.Qwen3MoeConfig,
        {**_EXPERTS, "head_dim": 8, "tie_word_embeddings": False},
    ),
}
"""Those whose every size changes."""

INNER = {
    "gemma": Kind(T.GemmaForCausalLM, T.GemmaConfig, {"head_dim": 8}),
    "gpt_neox": Kind(T.GPTNeoXForCausalLM, T.GPTNeoXConfig, {"num_key_value_heads": None}),
    "gpt2": Kind(
        T.GPT2LMHeadModel,
        lambda **sizes: T.GPT2Config(
            n_embd=32, n_head=4, n_layer=2, n_inner=48, vocab_size=VOCAB, eos_token_id=None
        ),
    ),
}
"""Those of which only the intermediate size changes."""


def build(kind: str, seed: int = 1, **changes: Any) -> Any:
    """Return a model in float32, every weight random: gains near 1, all else far from 0."""
    made = (KINDS | INNER)[kind]
    model = made.model(made.make(**changes))
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        with torch.no_grad():
            weight.copy_(weight + 0.1 * noise if weight.ndim < 2 else 0.2 * noise)
    return model.eval()


def save(kind: str, folder: Path, seed: int = 1, **changes: Any) -> Path:
    """Save a random model and return its folder."""
    build(kind, seed, **changes).save_pretrained(folder)
    return folder


def load(kind: str, folder: Path) -> Any:
    """Load a model as transformers does: no key missing or left over, no shape wrong."""
    found, info = (KINDS | INNER)[kind].model.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    return found.eval()


def tokens() -> Tensor:
    return torch.randint(2, VOCAB, (2, 9), generator=torch.Generator().manual_seed(7))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def generated(model: Any) -> Tensor:
    """Return what a model writes with its cache."""
    return model.generate(tokens(), max_new_tokens=6, do_sample=False, use_cache=True)


def change(method: str, model: Path | str, output: Path, like: Path | None = None, **sizes: Any):
    """Run a recipe that changes sizes."""
    recipe = {"merge_method": method, "models": [{"model": str(model)}], "parameters": sizes}
    if like is not None:
        recipe["base_model"] = str(like)
    return merge(recipe, output)


Change = Callable[..., Any]
