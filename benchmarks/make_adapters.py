#!/usr/bin/env python3
"""Write LoRA adapters of random bf16 numbers for all linear layers of a Llama-shaped model.

    python benchmarks/make_adapters.py FOLDER [--size 1.2B] [--rank 16] [--name NAME]

The model itself is not needed. a is drawn from N(0, 1/sqrt(inputs)) and b from N(0, 0.02), so that
changes are as large as those of trained adapters. Adapters that are there already are kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from llama import MODELS, Llama, Shard
from make_models import bf16

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def factors(model: Llama, rank: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor of an adapter, sorted as peft writes them."""
    for name, shape in sorted(model.tensors()):
        module = name.removesuffix(".weight")
        if module.endswith(MODULES):
            yield f"base_model.model.{module}.lora_A.weight", (rank, shape[1])
            yield f"base_model.model.{module}.lora_B.weight", (shape[0], rank)


def config(rank: int, base: str) -> dict[str, object]:
    """Return adapter_config.json; the scale is 2."""
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(MODULES),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }


def make_adapter(folder: Path, name: str, size: str, rank: int, seed: int) -> Path:
    """Write one adapter into folder/name, whole or not at all, and return where."""
    target, partial = folder / name, folder / f"{name}.partial"
    if target.exists():
        return target
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = tuple(factors(MODELS[size], rank))
    generator = np.random.Generator(np.random.SFC64(seed))
    with (partial / "adapter_model.safetensors").open("wb") as file:
        file.write(Shard(file.name, tensors).header())
        for tensor, shape in tensors:
            spread = shape[1] ** -0.5 if "lora_A" in tensor else 0.02
            drawn = generator.standard_normal(shape, dtype=np.float32) * np.float32(spread)
            file.write(bf16(drawn).data)
    text = json.dumps(config(rank, f"models/{size}"), indent=2)
    (partial / "adapter_config.json").write_text(text)
    partial.rename(target)
    return target


def main() -> None:
    """Make the adapter that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=MODELS, default="1.2B")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--name", help="default: adapter-RANK")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    name = options.name or f"adapter-{options.rank}"
    make_adapter(options.folder, name, options.size, options.rank, options.seed)


if __name__ == "__main__":
    main()
