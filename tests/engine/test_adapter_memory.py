"""Runs with adapters keep the promise of their plans: resident memory of the whole process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

CHILD = """
import json, resource, sys
from merge_kit.api import merge
recipe, output, threads = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
done = merge(recipe, output, threads=threads)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
peak *= 1 if sys.platform == "darwin" else 1024
print(json.dumps([peak, done.plan.bill.peak_bytes]))
"""
RANK = 64
GENERATOR = torch.Generator().manual_seed(9)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A model of 100 MB in two matrices and an embedding, and two adapters of all of it."""
    folder = tmp_path_factory.mktemp("large")
    shapes = {"layers.0.up_proj": (7000, 3001), "layers.0.down_proj": (3001, 7000)}
    tokens = (60_000, 128)
    weights = {f"{name}.weight": normal(*shape).bfloat16() for name, shape in shapes.items()}
    weights["lookup.weight"] = normal(*tokens).bfloat16()
    save_file(weights, folder / "base.safetensors")
    for adapter in ("one", "two"):
        factors = {}
        for name, (rows, columns) in shapes.items():
            factors[f"base_model.model.{name}.lora_A.weight"] = normal(RANK, columns)
            factors[f"base_model.model.{name}.lora_B.weight"] = normal(rows, RANK)
        factors["base_model.model.lookup.lora_embedding_A"] = normal(RANK, tokens[0])
        factors["base_model.model.lookup.lora_embedding_B"] = normal(tokens[1], RANK)
        (folder / adapter).mkdir()
        save_file(factors, folder / adapter / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "r": RANK,
            "lora_alpha": 16,
            "target_modules": ["up_proj", "down_proj", "lookup"],
            "base_model_name_or_path": "base",
        }
        (folder / adapter / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged(recipe: dict, output: Path, threads: int) -> tuple[int, int]:
    """Return peak and promise of a merge in a process of its own.

    The shell between the two processes is small: a process that is started directly inherits the
    peak of its parent, which holds torch and more.
    """
    command = [sys.executable, "-c", CHILD, json.dumps(recipe), str(output), str(threads)]
    shell = ["sh", "-c", '"$@"; exit $?', "sh", *command]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, promised = json.loads(done.stdout)
    return peak, promised


@pytest.mark.parametrize("threads", [1, 2])
def test_adapters_merged_into_a_large_model_stay_within_the_bill(large, tmp_path, threads):
    base, one, two = large / "base.safetensors", large / "one", large / "two"
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{base}+{one}+{two}"}]}
    peak, promised = merged(recipe, tmp_path / "out", threads)
    assert peak <= promised
    assert promised < 330e6


@pytest.mark.parametrize("method", ["lora_concat", "lora_svd"])
def test_adapters_combined_stay_within_the_bill(large, tmp_path, method):
    half = {"weight": 0.5}
    models = [{"model": str(large / name), "parameters": half} for name in ("one", "two")]
    peak, promised = merged({"merge_method": method, "models": models}, tmp_path / "out", 2)
    assert peak <= promised
    factors = 2 * RANK * (2 * 10_001 + 60_128)
    assert promised < (320e6 if method == "lora_concat" else 320e6 + 8 * 12 * factors)
