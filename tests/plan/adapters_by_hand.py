"""Bases and adapters of whole numbers, with which every sum is exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_kit.errors import MergeKitError
from tests.toys import plan, write

HIDDEN, TOKENS = 3, 4
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
Q, UP = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.up_proj"
PREFIX = "base_model.model."
F32 = torch.float32


def numbers(*shape: int, start: int = 1) -> torch.Tensor:
    """Return small whole numbers, with which every sum here is exact."""
    count = torch.Size(shape).numel()
    return (torch.arange(start, start + count) % 7 - 3).float().reshape(shape)


def base(folder: Path, *, dtype=F32, layers: int = 2, tensors=(), **config) -> Path:
    """Write a model of two layers, with a head of its own unless it is tied."""
    found = {EMBEDDING: numbers(TOKENS, HIDDEN), NORM: numbers(HIDDEN, start=3)}
    for i in range(layers):
        found[f"{Q.format(i)}.weight"] = numbers(HIDDEN, HIDDEN, start=i)
        found[f"{UP.format(i)}.weight"] = numbers(5, HIDDEN, start=i + 2)
    if not config.get("tie_word_embeddings"):
        found[HEAD] = numbers(TOKENS, HIDDEN, start=5)
    found |= dict(tensors)
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "tie_word_embeddings": False,
        **config,
    }
    return write(folder, {k: v.to(dtype) for k, v in found.items()}, settings)


def adapter(folder: Path, tensors: dict[str, torch.Tensor], **config) -> Path:
    """Write an adapter of peft; its names lack the prefix."""
    folder.mkdir(parents=True)
    named = {PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".lora_")[0].split(".")[-1] for name in tensors})
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def factors(module: str, out: int, into: int, *, start: int = 1, rank: int = 2, dtype=F32):
    """Return a and b of a linear module."""
    a, b = numbers(rank, into, start=start), numbers(out, rank, start=start + 3)
    return {f"{module}.lora_A.weight": a.to(dtype), f"{module}.lora_B.weight": b.to(dtype)}


def change(tensors: dict[str, torch.Tensor], module: str, scale: float = 2.0) -> torch.Tensor:
    b, a = tensors[f"{module}.lora_B.weight"], tensors[f"{module}.lora_A.weight"]
    return scale * b.double() @ a.double()


ON_Q = factors(Q.format(0), HIDDEN, HIDDEN)
ON_UP = factors(UP.format(1), 5, HIDDEN, start=2)
"""Two adapters that have no tensor in common; whole numbers, so that every order is exact."""


def write_models(folder: Path) -> Path:
    """Write a base, and two adapters for it; return the folder."""
    base(folder / "base")
    adapter(folder / "a", ON_Q)
    adapter(folder / "b", ON_UP)
    return folder


def passed(*references: object) -> str:
    """Return the recipe that only applies adapters."""
    entries = [{"model": reference} for reference in references]
    return json.dumps({"merge_method": "passthrough", "models": entries})


def weighed(base_name: str, **weights: float) -> dict:
    return {"model": base_name, "lora": [{"path": k, "weight": w} for k, w in weights.items()]}


def fates(made, key: str) -> dict[str, tuple[str, str]]:
    return {fate.tensor: (fate.what, fate.why) for fate in made.fates if fate.model == key}


def before(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "base" / "model.safetensors")


def changed_by(result, original) -> set[str]:
    return {name for name, tensor in result.items() if not torch.equal(tensor, original[name])}


SAVED = {"model.norm.weight": torch.tensor([7.0, 8.0, 9.0])}


def dora(module: str, magnitude: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_magnitude_vector": magnitude}


def rows(module: str, tokens: list[int], start: int) -> tuple[dict, dict]:
    name = f"{module}.token_adapter.trainable_tokens_delta"
    layer = module.rpartition(".")[2]
    held = {name: numbers(len(tokens), HIDDEN, start=start) + 10}
    return held, {"trainable_token_indices": {layer: tokens}}


def problem_of(recipe: str, folder: Path) -> MergeKitError:
    with pytest.raises(MergeKitError) as caught:
        plan(recipe, folder)
    return caught.value
