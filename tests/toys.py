"""Toy models whose every tensor holds one number, and merges of them in one call."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from merge_kit.engine.run import run_plan
from merge_kit.plan.build import build_plan
from merge_kit.recipe.parse import parse_recipe

WIDTH = 4
SUFFIXES = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")
OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def config(layers: int, **more) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        **more,
    }


def write(folder: Path, tensors: dict[str, torch.Tensor], settings: dict | None) -> Path:
    """Write a model of one file."""
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    if settings is not None:
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def toy(
    folder: Path,
    value: float = 1.0,
    *,
    layers: int = 5,
    by_layer: float = 0.0,
    outside: tuple[float, float, float] | None = None,
    dtype=torch.float32,
    **more,
) -> Path:
    """Write a toy model: `value` everywhere, or `by_layer * (i + 1)` in layer i."""
    rest = outside or (value, value, value)
    tensors = {
        name: torch.full((WIDTH,), number, dtype=dtype)
        for name, number in zip(OUTSIDE, rest, strict=True)
    }
    for i in range(layers):
        number = by_layer * (i + 1) if by_layer else value
        for suffix in SUFFIXES:
            tensors[f"model.layers.{i}.{suffix}"] = torch.full((WIDTH,), number, dtype=dtype)
    return write(folder, tensors, config(layers, **more))


def family(folder: Path) -> Path:
    """Write the toys of the dialect's examples: ONE, K, ZERO, IDX, IDK, MM."""
    for name, value in (("ONE", 1.0), ("K", 1000.0), ("ZERO", 0.0), ("MM", 1e6)):
        toy(folder / name, value)
    toy(folder / "IDX", by_layer=1.0, outside=(100.0, 200.0, 300.0))
    toy(folder / "IDK", by_layer=1000.0, outside=(1e5, 2e5, 3e5))
    return folder


def plan(recipe: str, folder: Path, **options):
    """Return the plan of a recipe whose models lie in a folder."""
    return build_plan(parse_recipe(recipe, folder=folder), **options)


def merge(recipe: str, folder: Path, **options) -> dict[str, torch.Tensor]:
    """Return the tensors of a merge, without a card or manifest."""
    made = plan(recipe, folder, **options)
    out = folder / f"out-{len(list(folder.glob('out-*')))}"
    out.mkdir()
    run_plan(made, out)
    tensors = {}
    for shard in made.shards:
        prefix = shard.name.rpartition("/")[0]
        for name, tensor in load_file(out / shard.name).items():
            tensors[f"{prefix}/{name}" if prefix else name] = tensor
    return tensors


def value(tensor: torch.Tensor) -> float:
    """Return the one number that a toy's tensor holds."""
    assert torch.all(tensor == tensor.flatten()[0])
    return float(tensor.flatten()[0])


def layers(tensors: dict[str, torch.Tensor], suffix: str = SUFFIXES[0]) -> list[float]:
    """Return the value of each layer."""
    found = []
    while (name := f"model.layers.{len(found)}.{suffix}") in tensors:
        found.append(value(tensors[name]))
    return found


def outside(tensors: dict[str, torch.Tensor]) -> list[float | None]:
    """Return the values of embeddings, final norm and head."""
    return [value(tensors[name]) if name in tensors else None for name in OUTSIDE]
