"""Tiny models written by hand: their names, their numbers, and how close a merge must come."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from tests import models
from tests.oracles.values import Array, Wanted

HIDDEN, WIDE, HEADS, VOCAB = 8, 12, 2, 10
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
HALF_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}
"""Most that one rounding to a dtype changes a number, relatively."""
FLAVOURS = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
FLAVOURS |= {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
LAYOUT_OF = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}


def shapes(kind: str, layers: int, *, tied: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a tiny model of a family."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(layers):
        lead = f"model.layers.{i}"
        for name in "qkvo":
            found[f"{lead}.self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
            if kind == "qwen2" and name != "o":
                found[f"{lead}.self_attn.{name}_proj.bias"] = (HIDDEN,)
        if kind == "qwen3":
            for name in ("q_norm", "k_norm"):
                found[f"{lead}.self_attn.{name}.weight"] = (HIDDEN // HEADS,)
        for name in ("gate_proj", "up_proj"):
            found[f"{lead}.mlp.{name}.weight"] = (WIDE, HIDDEN)
        found[f"{lead}.mlp.down_proj.weight"] = (HIDDEN, WIDE)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{lead}.{name}.weight"] = (HIDDEN,)
    found["model.norm.weight"] = (HIDDEN,)
    return found if tied else {**found, "lm_head.weight": (VOCAB, HIDDEN)}


def write(
    folder: Path, kind: str, layers: int, seed: int, dtype: torch.dtype, *, tied: bool = False
) -> dict[str, Array]:
    """Save a random model and return its numbers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes(kind, layers, tied=tied).items()
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": [FLAVOURS[kind]],
        "model_type": kind,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "hidden_act": "silu",
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return numbers(folder)


def numbers(folder: Path) -> dict[str, Array]:
    return {name: tensor.double().numpy() for name, tensor in models.stored(folder).items()}


def assert_equals(
    folder: Path,
    wanted: Mapping[str, Wanted],
    dtype: torch.dtype,
    besides: Iterable[str] = (),
) -> None:
    """Hold the stored tensors to an oracle: 2^-22 of the terms and one rounding to the dtype.

    Args:
        besides: Names that are stored too, and held to nothing here.
    """
    found = models.stored(folder)
    assert found.keys() == {*wanted, *besides}
    for name, value in wanted.items():
        assert found[name].dtype == dtype, name
        held = found[name].double().numpy()
        assert held.shape == value.value.shape, name
        allowed = 2.0**-22 * value.mass + HALF_UNIT[dtype] * np.abs(value.value)
        assert (np.abs(held - value.value) <= allowed).all(), name


def assert_copied(folder: Path, origins: Mapping[str, torch.Tensor]) -> None:
    """Hold the stored tensors to these, byte for byte."""
    models.assert_same_tensors(models.stored(folder), dict(origins))
