"""Small dense models of the architectures that have a sparse twin, saved by transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor

transformers.utils.logging.disable_progress_bar()

VOCAB = 48
LAYERS = 3
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@dataclass(frozen=True)
class Kind:
    """A dense model.

    Attributes:
        config: Class of its config, in transformers.
        values: Of the config.
        becomes: Layout of the mixture.
    """

    config: str
    becomes: str
    values: dict[str, Any] = field(default_factory=dict)


WINDOW = {"sliding_window": 4}
USED = {"use_sliding_window": True, **WINDOW}
KINDS = {
    "llama": Kind("LlamaConfig", "mixtral"),
    "llama, heads wider": Kind("LlamaConfig", "mixtral", {"head_dim": 16}),
    "llama, tied": Kind("LlamaConfig", "mixtral", {"tie_word_embeddings": True}),
    "llama 3": Kind("LlamaConfig", "mixtral", {"rope_parameters": LLAMA3}),
    "mistral": Kind("MistralConfig", "mixtral", {"sliding_window": None}),
    "mistral, window": Kind("MistralConfig", "mixtral", WINDOW),
    "llama as qwen2": Kind("LlamaConfig", "qwen2_moe", {"rope_parameters": LLAMA3}),
    "mistral as qwen2": Kind("MistralConfig", "qwen2_moe", {"head_dim": 16, **WINDOW}),
    "mistral as qwen2, no window": Kind("MistralConfig", "qwen2_moe", {"sliding_window": None}),
    "qwen2": Kind("Qwen2Config", "qwen2_moe"),
    "qwen2, tied": Kind("Qwen2Config", "qwen2_moe", {"tie_word_embeddings": True}),
    "qwen2, windows": Kind("Qwen2Config", "qwen2_moe", {**USED, "max_window_layers": 1}),
    "qwen3": Kind("Qwen3Config", "qwen3_moe", {"head_dim": 16}),
    "qwen3, biases": Kind("Qwen3Config", "qwen3_moe", {"attention_bias": True, "head_dim": 8}),
    "qwen3, tied": Kind("Qwen3Config", "qwen3_moe", {"tie_word_embeddings": True, "head_dim": 8}),
    "qwen3, windows": Kind(
        "Qwen3Config", "qwen3_moe", {**USED, "max_window_layers": 0, "head_dim": 8}
    ),
}


def build(kind: str, seed: int = 0, **values: Any) -> Any:
    """Return a random model; its biases and norms are random too."""
    known = KINDS[kind]
    config = getattr(transformers, known.config)(**{**SIZES, **known.values, **values})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() == 1 else 0.15
            parameter.add_(torch.randn(parameter.shape) * spread)
    return model


def saved(folder: Path, kind: str, seed: int = 0, **values: Any) -> Path:
    """Save a random model and return its folder."""
    build(kind, seed, **values).save_pretrained(folder, max_shard_size=20_000)
    return folder


def load(folder: Path) -> Any:
    """Load a model of which no tensor is missing, unexpected or of another shape."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values()), found
    return model.eval()


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors that the files of a folder hold."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def prompt(length: int = 12) -> Tensor:
    """Return two rows of tokens."""
    return torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(5))
